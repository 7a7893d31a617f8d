"""Sparse training in the compiled step: what is exactly 0, when masks change, over phases, devices
and checkpoints."""

import dataclasses

import jax
import numpy as np
import pytest
from test_steps import host_batches, program_of
from tiny import tiny_run, with_phases

from jaxpt.errors import ConfigError
from jaxpt.growth import Convert
from jaxpt.layerwise import LayerwiseStep
from jaxpt.mesh import Mesh
from jaxpt.models.attention import Attention
from jaxpt.optimizers import AdamW
from jaxpt.run import to_json
from jaxpt.sparsity import Gradual, NearZero, PruneGroups, RigL, Shrink
from jaxpt.sparsity.base import dense_twin
from jaxpt.state import flatten, unflatten
from jaxpt.steps import loss_function
from jaxpt.summary import costs
from jaxpt.weights import Dense, Masked
from jaxpt.weights.masked import packing_axis

OPTIMIZER = AdamW(lr=1e-2, weight_decay=0.1)
KEY = jax.random.key(3)
# Sparse in the feed-forward part alone: fewer programs' worth of masks to compile.
MASKED = (("*/mlp/*", Masked(0.25)), ("*", Dense()))
RIGL = RigL(every=2, stop=8, drop=0.5)
STEPS = 6


def sparse_run(folder, *updates, weights=MASKED, steps=STEPS, **changes):
    run = tiny_run(folder, steps=steps, updates=updates, optimizer=OPTIMIZER)
    return run.replace(**{"model.weights": weights, "batch": 4, "length": 16} | changes)


def masks(params):
    """Path of a weight -> its mask, bool [L, d_in, d_out]."""
    flat, found = flatten(params), {}
    for path, packed in flat.items():
        if path.endswith("/mask"):
            w = flat[path.removesuffix("mask") + "w"]
            axis = packing_axis(*w.shape[1:]) + 1
            bits = np.unpackbits(np.asarray(packed), axis=axis, bitorder="little")
            found[path.removesuffix("/mask")] = np.take(bits, range(w.shape[axis]), axis) > 0
    return found


def moments(state, path):
    states = flatten(state.opt_state.states)
    return {n.split("/")[-1]: np.asarray(x) for n, x in states.items() if n.startswith(path)}


def stepped(program, batches, state=None):
    """The states after each step, and its metrics."""
    state = program.init(jax.random.key(0)) if state is None else state
    found = []
    for batch in batches:
        state, metrics = program.train_step(state, program.put(batch), KEY)
        found.append((jax.device_get(state), jax.device_get(metrics)))
    return found, state


@pytest.fixture(scope="module")
def rigl(tmp_path_factory):
    """RigL's run, its program, batches and states."""
    folder, near = tmp_path_factory.mktemp("rigl"), NearZero(every=2, edges=(1e-9, 10.0))
    run = sparse_run(folder, RIGL, near, **{"step.accumulate": 2, "optimizer.clip": None})
    program = program_of(run)
    program.check()
    batches = host_batches(program, run, STEPS)
    return run, program, batches, stepped(program, batches)[0]


def test_sparse_then_dense(tmp_path):
    """SPDF: what is masked is exactly 0 through phase one, with its gradients and moments; in phase
    two it begins at 0 with fresh moments, and is free."""
    base = sparse_run(tmp_path, steps=3)
    first = dataclasses.replace(base.phases[0], name="sparse")
    dense = dataclasses.replace(base.model, weights=(("*", Dense()),))
    second = dataclasses.replace(
        first, name="dense", steps=2, model=dense, begin=(Convert(),), keep_optimizer=False
    )
    run = with_phases(base, first, second).validate()
    before, after = (program_of(run, i) for i in range(2))
    after.check(before)
    states, state = stepped(before, host_batches(before, run, 3))
    drawn = masks(states[0][0].params)
    assert set(drawn) == {"decoder/layers/mlp/up", "decoder/layers/mlp/down"}
    for now, _ in states:
        flat = flatten(now.params)
        for path, mask in drawn.items():
            np.testing.assert_array_equal(masks(now.params)[path], mask)
            assert (mask.sum((1, 2)) == 128).all()
            assert (flat[f"{path}/w"][mask] != 0).all()
            assert not flat[f"{path}/w"][~mask].any()
            mu, nu = (moments(now, f"{path}/w")[n] for n in ("mu", "nu"))
            assert not mu[~mask].any()
            assert not nu[~mask].any()
            assert (mu[mask] != 0).mean() > 0.99
    began = jax.device_get(after.follow(before, state, jax.random.key(1)))
    grown = jax.device_get(stepped(after, host_batches(after, run, 2), began)[1])
    for path, mask in drawn.items():
        w = flatten(began.params)[f"{path}/w"]
        np.testing.assert_array_equal(w, flatten(states[-1][0].params)[f"{path}/w"])
        assert not any(x.any() for x in moments(began, path).values())
        assert (flatten(grown.params)[f"{path}/w"][~mask] != 0).mean() > 0.99
        assert (moments(grown, f"{path}/w")["nu"][~mask] != 0).mean() > 0.99


def test_rigl_in_the_step(rigl):
    """Masks change before steps 2 and 4 alone, as algorithm 1 has it with an independent gradient
    of the dense model; new entries begin at 0 with moments of one step."""
    run, program, batches, states = rigl
    twin = dense_twin(program.model)
    loss = loss_function(twin, run.phases[0].objective)

    @jax.jit
    def slopes(params, batch, key):
        flat = flatten(params)
        params = unflatten({path: flat[path] for path in twin.tensors})
        grads = jax.grad(lambda p: (found := loss(p, batch, key)).total / found.count)(params)
        return flatten(grads)

    path = "decoder/layers/mlp/up"
    for step in range(1, STEPS):
        old, new = states[step - 1][0], states[step][0]
        was, now = masks(old.params)[path], masks(new.params)[path]
        assert (now.sum((1, 2)) == 128).all(), "density held, per layer, at every step"
        if step not in (2, 4):
            np.testing.assert_array_equal(was, now)
            continue
        key = jax.random.fold_in(KEY, step)
        with program.layout.active():
            g = np.asarray(slopes(old.params, program.put(batches[step]), key)[f"{path}/w"])
        w = flatten(old.params)[f"{path}/w"]
        fraction = 0.5 / 2 * (1 + np.cos(np.pi * step / 8))
        for layer in range(2):
            keep = round((1 - fraction) * 128)
            order = np.where(was[layer], np.abs(w[layer]), -1).ravel()
            left = np.zeros(512, bool)
            left[np.argsort(-order, kind="stable")[:keep]] = True
            order = np.where(left, np.inf, np.abs(g[layer]).ravel())
            want = np.sort(np.argsort(-order, kind="stable")[:128])
            np.testing.assert_array_equal(np.flatnonzero(now[layer]), want)
        fresh = now & ~was
        assert fresh.any()
        own = moments(new, f"{path}/w")
        after = flatten(new.params)[f"{path}/w"]
        # The step's own gradient is that of the new masks, with 0 where they have grown.
        flat, both = flatten(old.params), masks(new.params)
        for at, mask in masks(old.params).items():
            flat[f"{at}/w"] = np.where(mask & both[at], flat[f"{at}/w"], 0)
        with program.layout.active():
            g = np.asarray(slopes(unflatten(flat), program.put(batches[step]), key)[f"{path}/w"])
        np.testing.assert_allclose(own["mu"][fresh], 0.1 * g[fresh], rtol=1e-3, atol=1e-7)
        assert not own["nu"][~now].any()
        assert not after[~now].any()
        assert np.abs(after[fresh]).max() < 0.05, "new entries begin at 0"


def test_metrics(rigl):
    _, program, _, states = rigl
    full = 2 * 2 * 16 * 32
    for _, metrics in states:
        assert metrics["density"] == 0.25
        active = program.model.parameters - 0.75 * full
        assert metrics["active_parameters"] == active
        np.testing.assert_allclose(metrics["average_active_parameters"], active, rtol=1e-6)
        shares = metrics["near_zero/1e-09"], metrics["near_zero/10"]
    matrices = sum(p.d_in * p.d_out * p.stack for p in program.model.products.values())
    np.testing.assert_allclose(shares, (0.75 * full / matrices, 1.0), rtol=1e-5)
    (line,) = costs(program)
    assert line.startswith("Masked is dense in disguise")


def test_layer_by_layer_on_eight_devices_it_is_the_same(rigl):
    """As in two micro-batches on one."""
    run, _, batches, states = rigl
    mesh = Mesh(data=1, fsdp=2, tensor=4)
    program = program_of(run.replace(updates=(RIGL,), step=LayerwiseStep(), mesh=mesh))
    found, _ = stepped(program, batches[:3])
    path = "decoder/layers/mlp/down"
    for (state, metrics), (want, metrics_want) in zip(found, states, strict=False):
        pairs = [m["loss"][0] / m["loss"][1] for m in (metrics, metrics_want)]
        np.testing.assert_allclose(*pairs, rtol=1e-4)
        both = masks(state.params)[path], masks(want.params)[path]
        assert (both[0] != both[1]).mean() < 0.01, "but for ties of rounding"
    row = program.model.tensors[f"{path}/mask"]
    placed = program.abstract.params["decoder"]["layers"]["mlp"]["down"]["mask"].sharding
    assert placed.spec == program.layout.spec(row.axes)
    assert {"fsdp", "tensor"} <= set(jax.tree.leaves(tuple(placed.spec)))


def test_what_is_saved_goes_on_bit_by_bit(rigl, tmp_path):
    run, program, batches, states = rigl
    middle = jax.device_put(states[2][0], jax.tree.map(lambda a: a.sharding, program.abstract))
    with run.checkpoint.open(tmp_path / "saved", to_json(run)) as checkpoints:
        checkpoints.save(3, middle, {})
        checkpoints.wait()
        again = checkpoints.restore(3, program.abstract)
    last = stepped(program, batches[3:], again)[0][-1][0]
    jax.tree.map(np.testing.assert_array_equal, last, states[-1][0])


@pytest.mark.parametrize(
    ("update", "field", "message"),
    [
        (Gradual(density=0.5, start=5, stop=5), "updates.0.stop", "is not after the start"),
        (RigL(every=0), "updates.0.every", "give 1 step"),
    ],
)
def test_errors_in_a_phase(tmp_path, update, field, message):
    with pytest.raises(ConfigError, match=message) as error:
        sparse_run(tmp_path, update)
    assert error.value.field == field


def test_shares_of_an_unknown_length(tmp_path):
    with pytest.raises(ConfigError, match="not known beforehand") as error:
        sparse_run(tmp_path, RigL()).replace(seconds=10)
    assert error.value.field == "updates.0.stop"


# ------------------------------------------------------------------------- groups


def test_groups_are_pruned_and_the_model_shrinks(tmp_path):
    """Groups pruned in training compute nothing: the smaller model has the same outputs."""
    pruning = PruneGroups(channels=0.25, heads=0.5, every=1, start=1, stop=3)
    base = sparse_run(tmp_path, pruning, weights=(("*", Dense()),), steps=5)
    base = base.replace(**{"model.mlp.gated": True, "model.mlp.bias": True})
    small = dataclasses.replace(
        base.model,
        mlp=dataclasses.replace(base.model.mlp, width=8),
        attention=Attention(heads=2, head_dim=4),
    )
    first = dataclasses.replace(base.phases[0], name="prune")
    second = dataclasses.replace(
        first, name="small", model=small, begin=(Shrink(),), updates=(), keep_optimizer=False
    )
    run = with_phases(base, first, second).validate()
    before, after = (program_of(run, i) for i in range(2))
    after.check(before)
    batches = host_batches(before, run, 5)
    found, state = stepped(before, batches)
    for (now, _), share in zip(found, (1, None, 0.25, 0.25, 0.25), strict=True):
        alive = now.extra["PruneGroups"]["decoder/layers/mlp"]["alive"]
        if share is not None:
            np.testing.assert_array_equal(alive.sum(1), 32 * share)
    assert found[-1][1]["groups"] == (2 * (8 + 2), 2 * (32 + 4))
    alive = found[-1][0].extra["PruneGroups"]
    up = flatten(found[-1][0].params)["decoder/layers/mlp/up/w"]
    dead = ~alive["decoder/layers/mlp"]["alive"]
    assert not np.moveaxis(up, 1, 2)[dead].any(), "what is pruned stays 0"
    assert np.moveaxis(up, 1, 2)[~dead].all()
    params = after.follow(before, state, jax.random.key(0)).params
    assert flatten(params)["decoder/layers/attention/out/w"].shape == (2, 8, 16)
    with before.layout.active():
        losses = [
            loss_function(program.model, run.phases[0].objective)(p, batches[0], None).total
            for program, p in ((before, state.params), (after, params))
        ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_shrink_needs_heads_of_one_width(tmp_path):
    run = sparse_run(tmp_path, weights=(("*", Dense()),))
    old = run.model.build(64)
    new = dataclasses.replace(run.model, attention=Attention(heads=2)).build(64)
    with pytest.raises(ConfigError, match=r"set attention\.head_dim"):
        Shrink().validate(old, new)
    masked = dataclasses.replace(run.model, weights=MASKED).build(64)
    with pytest.raises(ConfigError, match="cannot be left out"):
        Shrink().validate(masked, masked)
