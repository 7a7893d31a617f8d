"""The steps: the gradient does not depend on how a batch is cut. (That the losses do not depend on
the mesh: test_mesh.py.)"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_run

from jaxpt.errors import ConfigError
from jaxpt.mesh import Layout, Mesh, constrain
from jaxpt.models.attention import Attention
from jaxpt.objectives.base import Loss
from jaxpt.objectives.causal import CausalLM
from jaxpt.objectives.ul2 import UL2
from jaxpt.optimizers import Adafactor, AdamW
from jaxpt.program import Program
from jaxpt.state import TrainState, flatten, unflatten
from jaxpt.steps import accumulated_gradients, loss_function, train_step


def program_of(run, index=0):
    return Program(run, index, run.tokenizer.build().vocabulary, run.mesh.build())


def host_batches(program, run, count):
    with program.loader(run.tokenizer.build()) as loader:
        return [next(loader) for _ in range(count)]


def ragged(batch, rng):
    """The batch with some rows emptied, so that micro-batches have different numbers of targets."""
    weights = batch["weights"].copy()
    for row in range(len(weights)):
        weights[row, rng.integers(0, weights.shape[1]) :] = 0
    weights[0] = 0
    return batch | {"weights": weights}


def assert_close(a, b, tolerance):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        x, y = np.asarray(a[path], np.float64), np.asarray(b[path], np.float64)
        np.testing.assert_allclose(
            x, y, rtol=tolerance, atol=tolerance * max(1e-3, np.abs(y).max()), err_msg=path
        )


@pytest.mark.parametrize(
    ("kind", "objective"),
    [("decoder", CausalLM()), ("encoder_decoder", UL2(z_loss=1e-3, label_smoothing=0.1))],
    ids=["decoder", "encoder-decoder"],
)
def test_gradient_does_not_depend_on_accumulation_or_devices(tmp_path, kind, objective):
    """16 rows = 4 x 4 = 2 devices x 2 x 4, with ragged targets: to 1e-6."""
    run = tiny_run(tmp_path, kind=kind, objective=objective, batch=16)
    program = program_of(run)
    batch = ragged(host_batches(program, run, 1)[0], np.random.default_rng(0))
    params = program.model.init(jax.random.key(0))
    loss = loss_function(program.model, run.phases[0].objective)

    def mean_gradient(layout: Layout, accumulate: int):
        def gradient(params, batch):
            sums, grads = accumulated_gradients(loss, params, batch, jax.random.key(0), accumulate)
            return sums.total / sums.count, jax.tree.map(lambda g: g / sums.count, grads)

        rows = layout.sharding(("batch",))
        with layout.active():
            return jax.jit(gradient)(params, jax.device_put(batch, rows))

    one = Mesh(devices=1).build()
    expected = mean_gradient(one, 1)
    assert float(expected[0]) > 1
    for layout, accumulate in ((one, 4), (Mesh(devices=2).build(), 2), (Mesh().build(), 2)):
        assert_close(mean_gradient(layout, accumulate), expected, 1e-6)


def test_padding_changes_nothing(tmp_path):
    """More empty rows and more padding positions give the same loss and gradient."""
    run = tiny_run(tmp_path)
    program = program_of(run)
    batch = host_batches(program, run, 1)[0]
    wider = {name: np.pad(x, ((0, 3), (0, 5))) for name, x in batch.items()}
    params = program.model.init(jax.random.key(0))
    loss = loss_function(program.model, run.phases[0].objective)
    with program.layout.active():
        results = [
            jax.jit(lambda p, b: accumulated_gradients(loss, p, b, jax.random.key(0), 1))(params, b)
            for b in (batch, wider)
        ]
    assert float(results[0][0].count) == float(results[1][0].count) > 0
    assert_close(results[0], results[1], 1e-6)


def test_optimizer_state_lies_like_its_parameters(tmp_path):
    run = tiny_run(tmp_path)
    run = dataclasses.replace(run, mesh=Mesh(data=2, fsdp=2, tensor=2))
    for optimizer in (AdamW(), Adafactor()):
        phase = dataclasses.replace(run.phases[0], optimizer=optimizer)
        program = program_of(dataclasses.replace(run, phases=(phase,)))
        abstract = program.abstract
        flat = flatten(abstract.params)
        found = 0
        for path, leaf in flatten(abstract.opt_state).items():
            owner = next((p for p in flat if f"/{p}/" in f"{path}/"), None)
            if owner is not None and leaf.shape == flat[owner].shape and leaf.ndim > 1:
                assert leaf.sharding == flat[owner].sharding, path
                found += 1
        assert found >= len([p for p in flat if flat[p].ndim > 1]) or isinstance(
            optimizer, Adafactor
        )


def test_state_is_donated(tmp_path):
    program = program_of(tiny_run(tmp_path))
    state = program.init(jax.random.key(0))
    batch = host_batches(program, program.run, 1)[0]
    kept = jax.tree.leaves(state)
    program.train_step(state, program.put(batch), jax.random.key(1))
    assert all(x.is_deleted() for x in kept)


@pytest.mark.smoke
def test_sgd_step_by_hand():
    """On a quadratic with known sums: p - lr * grad(sum) / count, and metrics stay pairs."""

    def loss(params, batch, key):
        error = params["w"] * batch["x"] - batch["y"]
        return Loss(jnp.sum(batch["weights"] * error**2), jnp.sum(batch["weights"]))

    x, y, weights = (
        np.array([[1.0, 2], [3, 4]]),
        np.array([[2.0, 2], [2, 2]]),
        np.array([[1.0, 1], [1, 0]]),
    )
    batch = {"x": x, "y": y, "weights": weights, "segments": np.ones((2, 2), np.int32)}
    optimizer = optax.sgd(0.1)
    params = {"w": jnp.float32(1)}
    for accumulate in (1, 2):
        step = jax.jit(train_step(loss, optimizer, accumulate))
        state, metrics = step(
            TrainState(jnp.int32(0), params, optimizer.init(params)), batch, jax.random.key(0)
        )
        gradient = (weights * 2 * (x - y) * x).sum() / 3
        np.testing.assert_allclose(float(state.params["w"]), 1 - 0.1 * gradient, rtol=1e-6)
        np.testing.assert_allclose(
            [float(v) for v in metrics["loss"]], [(weights * (x - y) ** 2).sum(), 3]
        )
        np.testing.assert_allclose(float(metrics["grad_norm"]), abs(gradient), rtol=1e-6)
        assert int(state.step) == 1
        assert float(metrics["tokens"]) == 4


def test_layout_refuses_what_does_not_fit():
    layout = Mesh(data=2, tensor=4).build()
    with pytest.raises(ConfigError, match=r"does not divide"):
        layout.spec(("embed", "heads"), (8, 6))
    with pytest.raises(ConfigError, match="no rule for logical axis 'colour'"):
        layout.spec(("colour",))
    with pytest.raises(ConfigError, match="1 x 1 x 1 x 3 x 1 = 3, but there are 8 devices"):
        Mesh(data=1, tensor=3).build()
    with pytest.raises(ConfigError, match="8 devices cannot be cut into 3"):
        Mesh(tensor=3).build()
    with pytest.raises(RuntimeError, match="no layout"):
        constrain(jnp.zeros((2, 2)), "batch", None, name="x")


def test_one_key_head_serves_two_tensor_shards(tmp_path):
    """Keys of grouped heads are cut through a head where the mesh asks for it: still right."""
    run = tiny_run(tmp_path)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, attention=Attention(heads=4, kv_heads=1)),
        mesh=Mesh(data=4, tensor=2),
    )
    program = program_of(run)
    batch = host_batches(program, run, 1)[0]
    state = program.init(jax.random.key(0))
    _, metrics = program.train_step(state, program.put(batch), jax.random.key(1))
    assert np.isfinite(float(metrics["loss"][0]))


def test_flatten_round_trip():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
