"""Optimizers that work in a subspace of each gradient, against numpy in float64."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optimizers import adam, assert_close, build, draw, run, unstacked
from test_optimizers import unstacked_table as alone_table

from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.optimizers import APOLLO, AdamW, Fira, GaLore
from jaxpt.optimizers.projection import iterated, leading, random_orthonormal
from jaxpt.paths import without_number
from jaxpt.state import flatten
from jaxpt.weights.base import Tensor

LAYERS, STEPS, RANK = 2, 20, 3
TENSORS = {
    "layers/wide/w": Tensor((LAYERS, 4, 7), ("layers", "embed", "mlp"), 0.5, "Dense"),
    "tall/w": Tensor((8, 5), ("mlp", "embed"), 0.5, "Dense"),
    "square/w": Tensor((5, 5), ("mlp", "embed"), 0.5, "Dense"),
    "thin/w": Tensor((3, 6), (None, "embed"), 0.5, "Dense"),  # rank >= its smaller side
    "norm/scale": Tensor((4,), ("width",), 0.0, "norm"),
    "head/w": Tensor((4, 6), ("embed", "vocab"), 0.5, "Dense"),
}
PROJECTED = {"layers/wide/w", "tall/w", "square/w"}
OPTIONS = {"lr": 1e-2, "clip": None, "weight_decay": 0.0, "rank": RANK, "period": 6}
ROWS = {
    "galore": GaLore(**OPTIONS),
    "galore_reset": GaLore(**OPTIONS, reset=True, side="larger", scale=1.0),
    "golore": GaLore(**OPTIONS, random_after=7, side="in"),
    "fira": Fira(**OPTIONS),
    "apollo": APOLLO(**OPTIONS),
    "apollo_mini": APOLLO(**OPTIONS | {"rank": 1}, scaling="tensor", scale=128.0, side="out"),
}


def key_of(config, path, layer):
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(without_number(path).encode()))
    return jax.random.fold_in(key, layer)


def projector(c, s, g, t, key):
    """P at step t (from 1), float64."""
    if isinstance(c, APOLLO):
        return np.asarray(c.projector(key, jnp.int32(t - 1), len(g), "float32"), np.float64)
    if (t - 1) % c.period == 0:
        s["p"] = np.linalg.svd(g, full_matrices=False)[0][:, : c.rank]
        s["p"] = s["p"] * np.sign(s["p"][np.abs(s["p"]).argmax(0), np.arange(c.rank)])
        if c.random_after is not None and t - 1 >= c.random_after:
            drawn = random_orthonormal(jax.random.fold_in(key, t - 1), len(g), c.rank, "float32")
            s["p"] = np.asarray(drawn, np.float64)
        if c.reset:
            s.pop("m", None), s.pop("v", None)
    return s["p"]


def limit(c, s, u):
    norm = np.linalg.norm(u)
    if "last" in s and c.growth is not None:
        u = u * min(1, c.growth * s["last"] / norm)
    s["last"] = np.linalg.norm(u)
    return u


def published(c, s, g, t, key):
    """The papers' algorithms for one matrix whose projected side comes first."""
    p = projector(c, s, g, t, key)
    r = p.T @ g
    since = (t - 1) % c.period + 1 if getattr(c, "reset", False) else t
    n = adam(c, s, r, None, since, None)
    if isinstance(c, APOLLO):
        axis = 0 if c.scaling == "channel" else None
        return c.scale**0.5 * limit(
            c, s, g * np.linalg.norm(n, axis=axis) / np.linalg.norm(r, axis=axis)
        )
    u = c.scale * p @ n
    if isinstance(c, Fira):
        u = u + limit(c, s, np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0) * (g - p @ r))
    return u


def reference(c, params, gradients):
    params = {k: np.asarray(v, np.float64) for k, v in flatten(unstacked(params, LAYERS)).items()}
    states = {path: {} for path in params}
    for t, grads in enumerate(gradients, 1):
        for path, g in flatten(unstacked(grads, LAYERS)).items():
            g, name = np.asarray(g, np.float64), without_number(path)
            layer = int(path.split("/")[0].rpartition("_")[2]) if name != path else 0
            d_in, d_out = g.shape if g.ndim == 2 else (0, 0)
            first = {"in": True, "out": False, "smaller": d_in <= d_out, "larger": d_in > d_out}
            turned = g if first[c.side] or g.ndim < 2 else g.T
            inner = name in PROJECTED or name == "thin/w"
            if inner and len(turned) > c.rank:
                u = published(c, states[path], turned, t, key_of(c, name, layer))
            else:
                u = adam(c, states[path], turned, None, t, None)
            params[path] = params[path] - c.lr * (u if turned is g else u.T)
    return params


@pytest.mark.parametrize("config", ROWS.values(), ids=ROWS)
def test_equals_the_published_update(config):
    """20 steps: wide and stacked, tall, square, rank above the smaller side."""
    params, gradients = draw(0, TENSORS), [draw(i + 1, TENSORS) for i in range(STEPS)]
    ours, _ = run(build(config, TENSORS), params, gradients)
    want = reference(config, params, gradients)
    got = flatten(unstacked(ours, LAYERS))
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=2e-5, rtol=2e-5, err_msg=path)


@pytest.mark.parametrize("name", ["golore", "fira", "apollo", "apollo_mini"])
def test_stacked_layers_are_trained_as_layers_that_stand_alone(name):
    params, gradients = draw(0, TENSORS), [draw(i + 1, TENSORS) for i in range(3)]
    stacked, _ = run(build(ROWS[name], TENSORS), params, gradients)
    alone, _ = run(
        build(ROWS[name], alone_table(TENSORS, LAYERS)),
        unstacked(params, LAYERS),
        [unstacked(g, LAYERS) for g in gradients],
    )
    assert_close(unstacked(stacked, LAYERS), alone, 2e-6)


@pytest.mark.parametrize("name", ["galore", "fira", "apollo"])
def test_full_rank_is_adam(name):
    config = dataclasses.replace(ROWS[name], rank=8)
    plain = AdamW(config.lr, clip=None, weight_decay=0.0, b2=config.b2)
    params, gradients = draw(0, TENSORS), [draw(i + 1, TENSORS) for i in range(5)]
    ours, theirs = (run(build(c, TENSORS), params, gradients)[0] for c in (config, plain))
    assert_close(ours, theirs, 1e-6)


def numbers_held(config, d_in, d_out):
    """Of one matrix: moments [rank, m]; but for APOLLO, which draws it, a projector [n, rank]; the
    limiter's norm. Adam's moments where there is nothing to project."""
    first = {"in": True, "out": False, "smaller": d_in <= d_out, "larger": d_in > d_out}
    n, m = (d_in, d_out) if first[config.side] else (d_out, d_in)
    if n <= config.rank:
        return 2 * n * m
    projector = 0 if isinstance(config, APOLLO) else n * config.rank
    return 2 * config.rank * m + projector + (1 if isinstance(config, APOLLO | Fira) else 0)


@pytest.mark.parametrize("config", ROWS.values(), ids=ROWS)
def test_bytes_of_the_state(config):
    state = jax.eval_shape(build(config, TENSORS).init, draw(0, TENSORS))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    expected = 4  # the count
    for path, tensor in TENSORS.items():
        shape = tensor.shape[-2:] if len(tensor.shape) > 1 else (0, 0)
        inner = path in PROJECTED or path == "thin/w"
        layers = LAYERS if tensor.stacked else 1
        numbers = numbers_held(config, *shape) if inner else 2 * int(np.prod(tensor.shape))
        expected += 4 * layers * numbers
    assert held == expected


def test_subspaces():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (12, 9))
    g = jnp.float32(u * [8, 4, 2, 0.01] @ v.T)
    found = leading(g, 3)
    np.testing.assert_allclose(np.abs(found.T @ u[:, :3]), np.eye(3), atol=1e-5)
    assert (found[jnp.argmax(jnp.abs(found), 0), jnp.arange(3)] > 0).all()
    start = random_orthonormal(jax.random.key(0), 12, 3, "float32")
    np.testing.assert_allclose(start.T @ start, np.eye(3), atol=1e-5)
    near = iterated(g, start, 4)
    np.testing.assert_allclose(near @ (near.T @ u[:, :3]), u[:, :3], atol=1e-3)
    # The first update lies in the subspace, however that was found.
    tensors = {"up/w": Tensor((12, 9), (None, None), 1.0, "Dense")}
    for method in ("svd", "iterate"):
        config = dataclasses.replace(ROWS["galore"], method=method, rounds=8, side="in")
        zeros = {"up": {"w": jnp.zeros((12, 9))}}
        after = run(build(config, tensors), zeros, [{"up": {"w": g}}])[0]["up"]["w"]
        assert np.abs(after).max() > 1e-4
        np.testing.assert_allclose(found @ (found.T @ after), after, atol=1e-6)


def test_configs_round_trip():
    for config in ROWS.values():
        assert codec.from_json(codec.to_json(config), type(config)) == config


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: GaLore(rank=0), "rank"),
        (lambda: GaLore(period=0), "period"),
        (lambda: GaLore(side="both"), "side"),  # type: ignore[arg-type]
        (lambda: GaLore(method="qr"), "method"),  # type: ignore[arg-type]
        (lambda: GaLore(rounds=0), "rounds"),
        (lambda: GaLore(scale=0.0), "scale"),
        (lambda: GaLore(random_after=-1), "random_after"),
        (lambda: Fira(growth=1.0), "growth"),
        (lambda: APOLLO(scaling="row"), "scaling"),  # type: ignore[arg-type]
        (lambda: APOLLO(growth=0.5), "growth"),
        (lambda: APOLLO(eps=0.0), "eps"),
    ],
)
def test_wrong_choices_are_named(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field


def test_apollo_draws_a_subspace_a_period():
    key, config = jax.random.key(0), ROWS["apollo"]
    drawn = [np.asarray(config.projector(key, jnp.int32(t), 400, "float32")) for t in range(13)]
    changed = [t for t in range(1, 13) if not np.array_equal(drawn[t], drawn[t - 1])]
    assert changed == [6, 12]
    assert np.std(drawn[0]) == pytest.approx(1 / np.sqrt(RANK), rel=0.1)
