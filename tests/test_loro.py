"""LORO, against its algorithm in numpy and against the geometry that it stands for, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layerwise import trained
from test_optimizers import adam, assert_close, build, draw, run, unstacked
from test_optimizers import unstacked_table as alone_table
from tiny import tiny_run

from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.layerwise import LayerwiseStep
from jaxpt.mesh import Mesh
from jaxpt.optimizers import LORO, AdamW, Group
from jaxpt.optimizers.loro import exact
from jaxpt.state import flatten
from jaxpt.weights import Dense, LowRank
from jaxpt.weights.base import Tensor

LAYERS, STEPS, RANK = 2, 20, 3
SHAPES = {"layers/wide": (4, 7), "tall": (8, 5), "square": (5, 5), "full": (3, 6)}


def low_rank(path, n, m):
    stack, layers = ((LAYERS,), ("layers",)) if "layers" in path else ((), ())
    return {
        f"{path}/a": Tensor((*stack, n, RANK), (*layers, None, "rank"), 1.0, "LowRank"),
        f"{path}/b": Tensor((*stack, RANK, m), (*layers, "rank", None), 1.0, "LowRank"),
    }


TENSORS = {path: t for p, (n, m) in SHAPES.items() for path, t in low_rank(p, n, m).items()} | {
    "norm/scale": Tensor((4,), ("width",), 0.0, "norm"),
    "dense/w": Tensor((4, 6), (None, None), 0.5, "Dense"),
}
OPTIONS = {"lr": 1e-2, "clip": None, "period": 6}
ROWS = {
    "loro": LORO(**OPTIONS),
    "loro_kept": LORO(**OPTIONS, reset=False, weight_decay=0.1),
    "loro_plain": LORO(**OPTIONS, adam=False),
}


def algorithm(c, s, a, b, da, db, t):
    """Mo et al. 2025, algorithm 1, of one matrix: B is our A, A our B; t = 1, 2, ..."""
    if c.adam:
        since = (t - 1) % c.period + 1 if c.reset else t
        if since == 1:
            s["a"], s["b"] = {}, {}
        da, db = (adam(c, s[k], g, None, since, None) for k, g in (("a", da), ("b", db)))
    (n, r), m, lr = a.shape, b.shape[1], c.lr
    if t % c.period != 0:
        return a - lr * (r / n) * da, b - lr * (r / m) * db
    (q_b, r_b), (q_a, r_a) = np.linalg.qr(a), np.linalg.qr(b.T)
    z_b, z_a = da @ np.linalg.inv(r_a), db.T @ np.linalg.inv(r_b)
    bar_b, bar_r_b = np.linalg.qr(z_b - q_b @ q_b.T @ z_b)
    bar_a, bar_r_a = np.linalg.qr(z_a - q_a @ q_a.T @ z_a)
    core = r_b @ r_a.T - lr * np.linalg.inv(r_b).T @ db @ q_a
    block = np.block([[core, -lr * bar_r_a.T], [-lr * bar_r_b, np.zeros((r, r))]])
    u, sigma, vt = np.linalg.svd(block)
    left, right = np.hstack([q_b, bar_b]) @ u[:, :r], np.hstack([q_a, bar_a]) @ vt[:r].T
    sign = np.sign(left[np.abs(left).argmax(0), np.arange(r)])
    root = sign * np.sqrt(sigma[:r])
    return left * root, (right * root).T


def reference(c, params, gradients):
    params = {k: np.asarray(v, np.float64) for k, v in flatten(unstacked(params, LAYERS)).items()}
    states = {path: {} for path in params}
    for t, grads in enumerate(gradients, 1):
        old = dict(params)
        flat = {k: np.asarray(v, np.float64) for k, v in flatten(unstacked(grads, LAYERS)).items()}
        for path, g in flat.items():
            if path.endswith("/a"):
                other = path[:-1] + "b"
                pair = old[path], old[other], g, flat[other]
                params[path], params[other] = algorithm(c, states[path], *pair, t)
            elif not path.endswith("/b"):
                since = (t - 1) % c.period + 1 if c.reset else t
                if since == 1:
                    states[path] = {}
                params[path] = old[path] - c.lr * adam(c, states[path], g, None, since, None)
        for path in params:
            if not path.startswith("norm"):
                params[path] = params[path] - c.lr * c.weight_decay * old[path]
    return params


@pytest.mark.parametrize("config", ROWS.values(), ids=ROWS)
def test_equals_the_published_update(config):
    """20 steps, 3 of them exact: wide and stacked, tall, square, of full rank."""
    tensors = TENSORS if config.adam else low_rank("layers/wide", 4, 7)
    params, gradients = draw(0, tensors), [draw(i + 1, tensors) for i in range(STEPS)]
    ours, _ = run(build(config, tensors), params, gradients)
    want, got = reference(config, params, gradients), flatten(unstacked(ours, LAYERS))
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=3e-5, rtol=3e-5, err_msg=path)


def test_stacked_layers_are_trained_as_layers_that_stand_alone():
    tensors = low_rank("layers/wide", 4, 7)
    params, gradients = draw(0, tensors), [draw(i + 1, tensors) for i in range(2)]
    config = dataclasses.replace(ROWS["loro"], period=2)
    stacked, _ = run(build(config, tensors), params, gradients)
    alone, _ = run(
        build(config, alone_table(tensors, LAYERS)),
        unstacked(params, LAYERS),
        [unstacked(g, LAYERS) for g in gradients],
    )
    assert_close(unstacked(stacked, LAYERS), alone, 1e-5)


def factors(rng, n, m, rank=RANK):
    a, b, g = (rng.normal(size=s) for s in ((n, rank), (rank, m), (n, m)))
    return a, b, g


def stepped(a, b, g, lr):
    """The product after an exact step along the gradient G of the product."""
    params, grads = {"a": a, "b": b}, {"a": g @ b.T, "b": a.T @ g}
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, grads))
    new = jax.tree.map(jnp.add, single[0], jax.jit(exact)(*single, jnp.float32(lr)))
    return np.asarray(new["a"], np.float64) @ np.asarray(new["b"], np.float64), new


@pytest.mark.parametrize(("n", "m"), SHAPES.values(), ids=SHAPES)
def test_exact_step_is_the_nearest_matrix_to_a_riemannian_step(n, m):
    a, b, g = factors(np.random.default_rng(0), n, m)
    w, lr = a @ b, 0.3
    u, _, vt = np.linalg.svd(w)
    p_u, p_v = u[:, :RANK] @ u[:, :RANK].T, vt[:RANK].T @ vt[:RANK]
    tangent = p_u @ g + g @ p_v - p_u @ g @ p_v
    u, s, vt = np.linalg.svd(w - lr * tangent)
    nearest = u[:, :RANK] * s[:RANK] @ vt[:RANK]
    got, new = stepped(a, b, g, lr)
    np.testing.assert_allclose(got, nearest, atol=2e-5)
    assert np.abs(got - w).max() > 0.1
    # The factors share the product's singular values evenly.
    np.testing.assert_allclose(new["a"].T @ new["a"], np.diag(s[:RANK]), atol=5e-5)
    np.testing.assert_allclose(new["b"] @ new["b"].T, np.diag(s[:RANK]), atol=5e-5)


def test_exact_step_does_not_depend_on_the_factorisation():
    rng = np.random.default_rng(1)
    a, b, g = factors(rng, 8, 5)
    q = rng.normal(size=(RANK, RANK)) + 2 * np.eye(RANK)
    here, there = stepped(a, b, g, 0.2)[0], stepped(a @ q, np.linalg.inv(q) @ b, g, 0.2)[0]
    np.testing.assert_allclose(here, there, atol=5e-5)
    # An approximate step does: it is plain descent of the factors.
    assert np.abs((a - g @ b.T) @ (b - a.T @ g) - (a @ q - g @ b.T) @ (b - a.T @ g)).max() > 1


def test_full_rank_is_gradient_descent():
    a, b, g = factors(np.random.default_rng(2), 4, 4, rank=4)
    np.testing.assert_allclose(stepped(a, b, g, 0.05)[0], a @ b - 0.05 * g, atol=5e-5)


def test_bytes_of_the_state():
    """Two moments of each number that is trained, and the count."""
    state = jax.eval_shape(build(LORO(), TENSORS).init, draw(0, TENSORS))
    numbers = sum(np.prod(t.shape) for t in TENSORS.values())
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 8 * numbers + 4
    plain = jax.eval_shape(build(LORO(adam=False), TENSORS).init, draw(0, TENSORS))
    assert {path.split("/")[0] for path in flatten(plain.states)} == {"norm", "dense"}


def test_in_eight_bits_and_bfloat16():
    tensors = low_rank("layers/big", 1500, 1400)
    config = LORO(0.1, clip=None, period=2, state_dtype="8bit", rounding="stochastic")
    params = draw(0, tensors, dtype="bfloat16")
    ours, state = run(build(config, tensors), params, [draw(i, tensors) for i in range(2)])
    held = {path: x.dtype for path, x in flatten(state).items()}
    assert [d for p, d in held.items() if p.endswith("codes")] == [np.uint8] * 4
    exactly = dataclasses.replace(config, state_dtype="float32", rounding="nearest")
    full, _ = run(build(exactly, tensors), params, [draw(i, tensors) for i in range(2)])
    for path, x in flatten(ours).items():
        assert x.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(x, np.float32)).all()
        y = flatten(full)[path]
        moved = np.linalg.norm(np.float32(y) - np.float32(flatten(params)[path]))
        assert np.linalg.norm(np.float32(x) - np.float32(y)) < 0.1 * moved


def test_factors_are_treated_alike():
    with pytest.raises(ConfigError, match="tall/a, tall/b are updated as one") as error:
        build(LORO(groups=(Group("tall/a", lr_scale=0.5),)), TENSORS)
    assert error.value.field == "groups"
    # With one of them frozen, Adam has the other.
    tensors = low_rank("tall", 8, 5)
    config = LORO(1e-2, clip=None, period=1, groups=(Group("tall/a", frozen=True),))
    adamw = AdamW(1e-2, clip=None, weight_decay=0.0, b2=0.999, groups=config.groups)
    gradients = [draw(1, tensors)]
    ours, theirs = (run(build(c, tensors), draw(0, tensors), gradients)[0] for c in (config, adamw))
    assert_close(ours, theirs, 1e-6)


WEIGHTS = (("*/mlp/up", LowRank(4)), ("*", Dense()))  # one, as QR and SVD are slow to compile


def test_trains_a_model_layer_by_layer_as_on_eight_devices(tmp_path):
    run_ = tiny_run(tmp_path, optimizer=LORO(3e-2, clip=None, period=2))
    run_ = run_.replace(**{"model.weights": WEIGHTS})
    losses, _, state = trained(run_.replace(step=LayerwiseStep()), 5)
    assert losses[-1] < losses[0]
    meshed, _, other = trained(run_.replace(mesh=Mesh(data=2, fsdp=2, tensor=2)), 5)
    np.testing.assert_allclose(meshed, losses, rtol=1e-5)
    assert flatten(other.opt_state).keys() == flatten(state.opt_state).keys()


def test_configs_round_trip_and_wrong_choices_are_named():
    for config in ROWS.values():
        assert codec.from_json(codec.to_json(config), LORO) == config
    for make, field in (
        (lambda: LORO(period=0), "period"),
        (lambda: LORO(b1=1.0), "b1"),
        (lambda: LORO(eps=0.0), "eps"),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert error.value.field == field
