"""Models of two networks: what is shared and held once, patterns, sizes, one network alone."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from electra_cases import DISCRIMINATOR, GENERATOR, MODEL, batch, means

from jaxpt.errors import ConfigError
from jaxpt.growth import Keep
from jaxpt.mesh import Mesh, single
from jaxpt.models import Electra, Transformer
from jaxpt.models.electra import electra_base, electra_small
from jaxpt.objectives import ReplacedTokens
from jaxpt.state import flatten


def test_shared_embeddings_are_held_once():
    model, apart = MODEL.build(60), dataclasses.replace(MODEL, shared=False).build(60)
    ours = {p for p in model.tensors if "embedding/" in p or "positions" in p or "_norm" in p}
    assert "discriminator/embedding/w" in ours
    assert not [p for p in model.tensors if p.startswith("generator/embedding/")]
    assert not [p for p in model.tensors if p.startswith("generator/encoder/positions")]
    held = sum(
        math.prod(t.shape)
        for p, t in model.tensors.items()
        if "embedding/" in p or "positions" in p or "/embedding_norm" in p
    )
    assert held == (64 + 48 + 2) * 16
    assert "generator/embedding/w" in apart.tensors
    assert apart.tensors["generator/embedding/w"].shape == (64, 8)
    # Of the published sizes: the discriminators of Hugging Face's ElectraForPreTraining.
    assert electra_small().build(30522).part("discriminator").parameters == 13_549_057
    assert electra_base().build(30522).part("discriminator").parameters == 109_483_009


def test_flops_are_those_of_both_networks():
    model = MODEL.build(60)
    networks = MODEL.networks
    alone = [config.build(60).flops(4, 24) for config in networks.values()]
    assert model.flops(4, 24) == sum(alone)
    products = sum(2 * p.d_in * p.d_out for p in networks["generator"].build(60).products.values())
    tied = 2 * 16 * 64  # the output: as wide as the embedding, 60 ids padded to 64
    scores = 4 * 4 * 8 * 24**2  # 4 rows, both heads together 8 wide
    assert alone[0] == 4 * 24 * (products + tied) + scores


def test_unrolled_layers_draw_what_stacked_ones_do():
    unrolled = dataclasses.replace(
        MODEL, discriminator=dataclasses.replace(DISCRIMINATOR, scan=False)
    )
    a = flatten(jax.jit(MODEL.build(60).init)(jax.random.key(3)))
    b = flatten(jax.jit(unrolled.build(60).init)(jax.random.key(3)))
    assert set(b) == set(unrolled.build(60).tensors)
    name = "encoder/layers{}/mlp/up/w"
    for i in range(1):
        np.testing.assert_array_equal(
            b["discriminator/" + name.format(f"_{i}")], a["discriminator/" + name.format("")][i]
        )
    np.testing.assert_array_equal(
        b["generator/" + name.format("")], a["generator/" + name.format("")]
    )


def test_each_network_draws_its_own():
    wide = dataclasses.replace(GENERATOR, width=16, attention=DISCRIMINATOR.attention)
    params = jax.jit(Electra(wide, DISCRIMINATOR, shared=False).build(60).init)(jax.random.key(3))
    drawn = {path: np.asarray(x) for path, x in flatten(params).items()}
    same = "encoder/layers/mlp/up/w"
    assert drawn[f"generator/{same}"].shape == drawn[f"discriminator/{same}"].shape
    assert (drawn[f"generator/{same}"] != drawn[f"discriminator/{same}"]).mean() > 0.9


def test_the_discriminator_goes_on_alone():
    """As a model of its own, and as the beginning of a phase with another head."""
    model = MODEL.build(60)
    params = jax.jit(model.init)(jax.random.key(0))
    data = batch()
    fields = {f.name: getattr(DISCRIMINATOR, f.name) for f in dataclasses.fields(Transformer)}
    after = Transformer(**fields).build(60)
    keep = Keep("discriminator", fresh=("lm_head*",))
    keep.validate(model, after)
    kept = keep(params, model, after, jax.random.key(1))
    assert set(flatten(kept)) == set(after.tensors)
    alone = model.part("discriminator")
    assert set(flatten(params["discriminator"])) == set(alone.tensors)
    with single().active():
        want = model.bind(params).discriminator(data)
        np.testing.assert_array_equal(alone.bind(params["discriminator"])(data), want)
        np.testing.assert_array_equal(after.bind(kept)(data), want)
    with pytest.raises(ConfigError, match=r"lm_head/w is .* no such tensor"):
        Keep("discriminator").validate(model, after)
    with pytest.raises(
        ConfigError, match="no network 'encoder'; known: 'discriminator', 'generator'"
    ):
        Keep("encoder").validate(model, after)
    with pytest.raises(ConfigError, match="matches no parameter"):
        Keep("discriminator", fresh=("lm_head*", "tail")).validate(model, after)
    with pytest.raises(ConfigError, match="generator cannot stand alone: another network holds"):
        model.part("generator")


def test_eight_devices_equal_one():
    model, data, objective = MODEL.build(60), batch(rows=8), ReplacedTokens()
    params = jax.jit(model.init)(jax.random.key(0))
    found = []
    for layout in (single(), Mesh(data=2, fsdp=2, tensor=2).build()):
        with layout.active():
            placed = jax.device_put(params, model.shardings(layout))
            rows = jax.device_put(data, layout.sharding(("batch",)))
            loss = jax.jit(lambda p, b: objective.loss(model.bind(p), b, jax.random.key(5)))
            result = jax.device_get(loss(placed, rows))
            found.append(means(result) | {"loss": result.total / result.count})
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5), name


def test_patterns_belong_to_their_network():
    bad = dataclasses.replace(GENERATOR, weights=(("decoder/*", GENERATOR.weights[0][1]),) * 1)
    with pytest.raises(ConfigError, match="no pattern matches encoder/"):
        dataclasses.replace(MODEL, generator=bad).build(60)
    bad = dataclasses.replace(
        GENERATOR, inits=(("embedding/w", electra_small().generator.inits[0][1]),)
    )
    with pytest.raises(ConfigError, match=r"generator\.inits: 'embedding/w' matches nothing"):
        dataclasses.replace(MODEL, generator=bad).build(60)
