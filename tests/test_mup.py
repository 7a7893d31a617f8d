"""muP: the same hyperparameters at any width, which the plain parametrisation fails."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import drawn

from jaxpt.errors import ConfigError
from jaxpt.mesh import single
from jaxpt.models import MLP, Attention, RelativeBias, Transformer, headed
from jaxpt.models.mup import MuP, Shapes, Times
from jaxpt.models.stack import watched
from jaxpt.optimizers import SGD, Adafactor, AdamW, Lion, Muon
from jaxpt.paths import without_number
from jaxpt.run import from_json, load, to_json
from jaxpt.weights import Constant, Dense, LowRank, Normal

VOCAB = 32
BASE = Shapes(width=64, heads=2)
STEPS = 10
SILENT = (("lm_head/w", Constant(0.0)),)  # appendix D.2
KINDS = {  # the models, each with an output of its own kind
    "decoder": {"inits": SILENT},
    "encoder": {"kind": "encoder", "tied": True, "head_transform": True, "output_bias": True},
    "encoder_decoder": {
        "kind": "encoder_decoder",
        "positions": RelativeBias(8, 16),
        "mlp": MLP(gated=True),
        "inits": SILENT,
    },
}


@pytest.fixture(autouse=True)
def one_device():
    with single().active():
        yield


def model_of(width, cls=MuP, **changes):
    own = {"base": BASE} if cls is MuP else {}
    fields = {"attention": Attention(heads=width // 32), "layers": 2, "vocab_multiple": 1}
    return cls(**({"width": width} | fields | changes | own))


def coordinates(config, optimizer):
    """Root mean squares of what goes through the model, at first and after ``STEPS`` updates on one
    batch: of the layers' outputs, of the logits, and of how far both have moved."""
    rng = np.random.default_rng(0)
    model = config.build(VOCAB)
    tokens, inputs, targets = jnp.asarray(rng.integers(0, VOCAB, (3, 4, 12)), jnp.int32)
    batch = {"tokens": tokens} | ({"inputs": inputs} if config.kind == "encoder_decoder" else {})
    built = optimizer.build(
        model.tensors,
        lambda step: jnp.float32(optimizer.lr),
        scales=config.rate_scales(optimizer, VOCAB),
    )

    def loss(params):
        network = model.bind(params)
        with watched() as outputs:
            logits = network.logits(network(batch))
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
        return -found.mean(), {"layers": outputs[-1], "logits": logits}

    def step(carry, _):
        params, state = carry
        grads, seen = jax.grad(loss, has_aux=True)(params)
        changes, state = built.update(grads, state, params)
        return (jax.tree.map(jnp.add, params, changes), state), seen

    @jax.jit
    def run(params):
        carry = params, built.init(params)
        return jax.lax.scan(step, carry, length=STEPS + 1)[1]

    seen = jax.tree.map(lambda x: (x[0], x[-1], x[-1] - x[0]), jax.device_get(run(drawn(model))))
    return {
        f"{name} {when}": math.sqrt(np.mean(np.square(x, dtype=np.float64)))
        for name, each in seen.items()
        for when, x in zip(("at first", "trained", "moved"), each, strict=True)
    }


def spread(found):
    """Of each coordinate: the largest over the widths by the smallest."""
    names = [name for name in found[0] if any(each[name] for each in found)]
    return {n: max(each[n] for each in found) / min(each[n] for each in found) for n in names}


@pytest.mark.parametrize(
    ("kind", "widths"),
    [("decoder", (64, 256, 1024)), ("encoder", (64, 256)), ("encoder_decoder", (64, 256))],
)
def test_coordinates_are_flat_in_the_width(kind, widths):
    """Yang et al. 2022, appendix D.1: activations are as large at any width, and change as much.
    Logits that do not begin at 0 are noise at first, which falls as the width's root."""
    optimizer = AdamW(lr=1e-2)
    each = [coordinates(model_of(w, **KINDS[kind]), optimizer) for w in widths]
    found = spread(each)
    if noise := found.pop("logits at first", None):
        assert each[0]["logits at first"] > each[1]["logits at first"]
        assert noise == pytest.approx(math.sqrt(widths[1] / widths[0]), rel=0.2)
    assert max(found.values()) < 1.2, found
    if kind == "decoder":  # at the first width both are one
        plain = coordinates(model_of(256, Transformer, **KINDS[kind]), optimizer)
        ratios = spread([each[0], plain])
        assert ratios["layers trained"] > 3, ratios
        assert ratios["logits trained"] > 2, ratios


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_shapes_of_the_base_it_is_the_plain_model(kind):
    mup, plain = (model_of(64, cls, **KINDS[kind]) for cls in (MuP, Transformer))
    assert mup.build(VOCAB).tensors == plain.build(VOCAB).tensors
    config = mup.plain(VOCAB)
    assert config.attention.scale == plain.head_dim**-0.5
    assert config.logit_scale == plain.logit_scale
    for optimizer in (AdamW(), SGD(), Muon()):
        assert set(mup.rate_scales(optimizer, VOCAB).values()) == {1.0}
    given = dict(config.inits)
    assert given.keys() <= set(map(without_number, plain.build(VOCAB).tensors))
    assert all(not isinstance(init, Times) or init.factor == 1 for init in given.values())


def test_a_wide_model_follows_the_table():
    """Four times as wide, with heads twice as wide: standard deviations, scales, learning rates."""
    inits = (("embedding/w", Normal(0.5)), ("*/out/w", Normal(0.02)))
    wide = model_of(256, attention=Attention(heads=4), inits=inits, logit_scale=2.0)
    model, small = wide.build(VOCAB), model_of(64, Transformer, inits=inits).build(VOCAB)
    std = {path: t.std / small.tensors[path].std for path, t in model.tensors.items() if t.std}
    layer = "decoder/layers"
    assert std["embedding/w"] == std["lm_head/w"] == 1
    assert std[f"{layer}/attention/out/w"] == std[f"{layer}/mlp/down/w"] == 1 / 2
    assert model.config.attention.scale == pytest.approx(32**-0.5 / 2)
    assert model.config.logit_scale == 2.0 / 4
    names = ("embedding/w", "lm_head/w", f"{layer}/mlp/up/w", f"{layer}/mlp_norm/scale")
    for optimizer, rates in (
        (AdamW(), (1, 1, 1 / 4, 1)),
        (Lion(), (1, 1, 1 / 4, 1)),
        (SGD(), (4, 4, 1, 4)),
        (Muon(), (1, 1, 1 / 2, 1)),
        (Muon(rms=None), (1, 1, 1, 1)),
    ):
        scales = wide.rate_scales(optimizer, VOCAB)
        assert scales.keys() == model.tensors.keys()
        assert tuple(scales[name] for name in names) == pytest.approx(rates), optimizer


def test_to_an_embedding_of_fixed_width():
    """What does not grow: the output has no factor, and the matrix before it is as in table 3."""
    changes = {"embedding_width": 16, "head_transform": True, "tied": True}
    wide = model_of(256, **changes)
    model, small = wide.build(VOCAB), model_of(64, Transformer, **changes).build(VOCAB)
    assert model.config.logit_scale == 1
    assert model.tensors["transform/w"].std == small.tensors["transform/w"].std / 4
    scales = wide.rate_scales(AdamW(), VOCAB)
    into = "decoder/embedding_projection/w"
    assert (scales["transform/w"], scales[into], scales["embedding/w"]) == (1 / 4, 1, 1)
    assert model.tensors[into].std == small.tensors[into].std


def test_the_optimizer_takes_the_rates_and_keeps_the_pull_of_decay():
    wide = model_of(256, layers=1)
    model, optimizer = wide.build(VOCAB), SGD(lr=1.0, momentum=0.0, weight_decay=0.5, clip=None)
    scales = wide.rate_scales(optimizer, VOCAB) | {"decoder/layers/mlp/up/w": 1 / 4}
    built = optimizer.build(model.tensors, lambda step: jnp.float32(1.0), scales=scales)
    params = jax.tree.map(jnp.ones_like, drawn(model))
    changes, _ = jax.jit(built.update)(params, built.init(params), params)
    np.testing.assert_allclose(changes["decoder"]["layers"]["mlp"]["up"]["w"], -(1 / 4 + 0.5))
    np.testing.assert_allclose(changes["embedding"]["w"], -4.0)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="no learning rates for Adafactor; known: AdamW"):
        model_of(64).rate_scales(Adafactor(), VOCAB)
    with pytest.raises(ConfigError, match="dense matrices"):
        model_of(64, weights=(("*/mlp/*", LowRank(4)), ("*", Dense())))
    with pytest.raises(ConfigError, match="scale_embeddings"):
        model_of(64, scale_embeddings=True)
    with pytest.raises(ConfigError, match=r"base\.attention\.heads"):
        dataclasses.replace(model_of(64), base=Shapes(width=64, heads=3))
    with pytest.raises(ConfigError, match="not a network of another"):
        _ = model_of(64).rules
    with pytest.raises(ConfigError, match="plain"):
        headed(model_of(64), classes=2)


def test_the_config():
    run = load("configs/mup_tiny.py")
    assert from_json(to_json(run)) == run
    wider = run.replace(**{"model.width": 512, "model.attention.heads": 8})
    assert wider.model_of(0).plain(VOCAB).logit_scale < run.model_of(0).plain(VOCAB).logit_scale
