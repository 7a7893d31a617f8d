"""Guards: an update that cannot be right is left out whole, alike everywhere, and told."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_distributed
from test_steps import host_batches, program_of
from test_train import assert_same_state, rows, stop_after
from tiny import tiny_run, with_phases

from jaxpt.data.device import DeviceBatches
from jaxpt.errors import ConfigError, Exit, NonFiniteError, exit_code
from jaxpt.files import read_json, read_metrics
from jaxpt.growth.average import Average
from jaxpt.guard import GOOD, NAME, NON_FINITE, SPIKE, Guard
from jaxpt.layerwise import LayerwiseStep
from jaxpt.optimizers import AdamW, Grass, ScheduleFree
from jaxpt.sparsity import SNIP, AtStart
from jaxpt.state import flatten
from jaxpt.train import train
from jaxpt.weights import Dense, Masked, Rows

KEY = jax.random.key(1)
SMALL: dict[str, Any] = {
    "model.layers": 2,
    "model.scan": True,
    "batch": 4,
    "length": 32,
    "loader.shards": 2,
}


def judged(guard, losses, norms=None):
    """The verdict on each of these steps, one after the other, and what the guard knows then."""
    own, verdicts = guard.init()[NAME], []
    judge = jax.jit(guard.judge)
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        good, own = judge(own, jnp.float32(loss), jnp.float32(norm))
        verdicts.append(int(own["verdict"]))
        assert bool(good) == (verdicts[-1] == GOOD)
    return verdicts, own


def test_what_is_not_finite_is_counted():
    verdicts, own = judged(Guard(), [1, np.nan, np.inf, 1, -np.inf], [1, 1, 1, 1, 1])
    assert verdicts == [GOOD, NON_FINITE, NON_FINITE, GOOD, NON_FINITE]
    assert (int(own["in_a_row"]), int(own["skipped"])) == (1, 3)
    assert judged(Guard(), [1, 1], [np.inf, 1])[0] == [NON_FINITE, GOOD]
    off = Guard(non_finite=False)
    assert off.init() == {}
    assert not off.on


def test_spikes_stand_above_the_good_steps_before():
    guard = Guard(spikes="skip", window=5, most=2, loss_score=4.0, gradient_score=20.0)
    calm = [2.0, 2.1, 1.9, 2.2, 1.8]
    scale = 1.4826 * 0.1  # of their deviations from 2.0: 0, 0.1, 0.1, 0.2, 0.2
    assert judged(guard, [9, *calm[1:]])[0] == [GOOD] * 5  # the window is not full
    verdicts, own = judged(guard, [*calm, 2 + 3.9 * scale])
    assert verdicts[5] == GOOD
    np.testing.assert_allclose(own["loss_score"], [2 + 3.9 * scale, *calm[1:]], rtol=1e-6)
    verdicts, own = judged(guard, [*calm, 2 + 4.1 * scale, 0.1, 4.0, 90.0, 90.0])
    # One that is low is none. After ``most`` of them nothing more is done.
    assert verdicts[5:] == [SPIKE, GOOD, SPIKE, GOOD, GOOD]
    assert int(own["spikes"]) == 2
    # What is left out does not count in what comes after.
    assert sorted(float(x) for x in judged(guard, [*calm, 50.0])[1]["loss_score"]) == sorted(
        float(np.float32(x)) for x in calm
    )
    assert judged(guard, [2.0] * 6, [*calm, 50.0])[0][5] == SPIKE
    assert judged(guard, [2.0] * 6, [*calm, np.nan])[0][5] == NON_FINITE
    # All alike: a deviation of a thousandth counts.
    assert judged(guard, [2.0] * 5 + [2.007])[0][5] == GOOD
    assert judged(guard, [2.0] * 5 + [2.009])[0][5] == SPIKE
    again = guard.next_phase(own)
    assert (int(again["seen"]), int(again["spikes"]), int(again["verdict"])) == (0, 2, GOOD)


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        ({"window": 3}, "window"),
        ({"in_a_row": -1}, "in_a_row"),
        ({"spikes": "stop"}, "spikes"),
        ({"loss_score": 0.0}, "loss_score"),
        ({"spikes": "skip", "loss_score": None, "gradient_score": None}, "spikes"),
    ],
)
def test_bad_choices_name_their_field(choice, field):
    with pytest.raises(ConfigError) as error:
        Guard(**choice)
    assert error.value.field == field


def poisoned(batch, value=np.nan):
    weights = np.array(batch["weights"])
    weights[0, :] = value
    return batch | {"weights": weights}


def but_for_the_guard(state):
    return dataclasses.replace(state, extra={k: v for k, v in state.extra.items() if k != NAME})


METHODS: dict[str, dict[str, Any]] = {
    "step": {
        "step.accumulate": 2,
        "model.layers": 1,
        "model.weights": (("*", Masked(1.0)),),
        "updates": (AtStart(score=SNIP()), Average()),
        "optimizer": AdamW(1e-2),
    },
    "layerwise": {
        "step": LayerwiseStep(),
        "model.layers": 1,
        "optimizer": ScheduleFree(1e-2),
        "updates": (Average(),),
    },
    "rows": {
        "step": LayerwiseStep(),
        "model.layers": 1,
        "model.weights": (("*/mlp/*", Rows(4)), ("*", Dense())),
        "optimizer": Grass(1e-2, rank=4, period=2),
    },
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_of_a_step_that_is_left_out_nothing_stays(tmp_path, method):
    """A NaN in the first batch, in which the masks would be chosen, and in the third."""
    program = program_of(run := tiny_run(tmp_path, **(SMALL | method)))
    batches = host_batches(program, run, 2)

    def after(*batches):
        state = program.init(jax.random.key(0))
        for batch in batches:
            state, metrics = program.train_step(state, program.put(batch), KEY)
        return jax.device_get(state), metrics

    straight = after(*batches)[0]
    state, metrics = after(poisoned(batches[0]), batches[0], poisoned(batches[1]), batches[1])
    assert_same_state(but_for_the_guard(state), but_for_the_guard(straight))
    assert int(state.step) == 2
    assert int(metrics["skipped"]) == 2
    assert np.isfinite(float(metrics["update_norm"]))
    fresh = jax.device_get(program.init(jax.random.key(0)))
    state, metrics = after(poisoned(batches[0]))
    assert_same_state(but_for_the_guard(state), but_for_the_guard(fresh))
    assert float(metrics["update_norm"]) == 0


def overflowing(state):
    """The first layer's MLP such that the loss is what it would be, and the square of a gradient
    is not: what goes into it is as small as what comes out of it is large."""
    mlp = state.params["decoder"]["layers"]["mlp"]
    mlp["up"]["w"] = mlp["up"]["w"].at[0].multiply(1e-25)
    mlp["down"]["w"] = mlp["down"]["w"].at[0].multiply(1e25)
    return state


@pytest.mark.parametrize("step", ["step", "layerwise"])
def test_a_gradient_that_is_not_finite(tmp_path, step):
    """The loss is. What layers after it have been given stays, in the layerwise step alone."""
    changes: dict[str, Any] = {"step": LayerwiseStep()} if step == "layerwise" else {}
    program = program_of(run := tiny_run(tmp_path, **SMALL, **changes))
    state = overflowing(program.init(jax.random.key(0)))
    before = jax.device_get(state)
    (batch,) = host_batches(program, run, 1)
    after, metrics = jax.device_get(program.train_step(state, program.put(batch), KEY))
    total, count = metrics["loss"]
    assert 1 < total / count < 100
    assert not np.isfinite(metrics["grad_norm"])
    assert int(metrics["skipped"]) == 1
    assert int(metrics["guard/verdict"]) == NON_FINITE
    if step == "step":
        assert_same_state(but_for_the_guard(after), but_for_the_guard(before))
        return
    old, new = flatten(but_for_the_guard(before)), flatten(but_for_the_guard(after))
    assert int(after.step) == int(after.opt_state.count) == 0
    for path, x in new.items():
        assert np.all(np.isfinite(x)), path
        if "/layers/" in path:
            np.testing.assert_array_equal(x[0], old[path][0], err_msg=path)
        elif "embed" in path and "head" not in path:
            np.testing.assert_array_equal(x, old[path], err_msg=path)
    up = "params/decoder/layers/mlp/up/w"
    assert not np.array_equal(new[up][1], old[up][1])


def test_a_layerwise_step_cannot_wait_for_the_norm(tmp_path):
    guard = Guard(spikes="skip")
    with pytest.raises(ConfigError, match="layers have been updated") as error:
        tiny_run(tmp_path, step=LayerwiseStep(), guard=guard)
    assert error.value.field == "guard.gradient_score"
    tiny_run(tmp_path, step=LayerwiseStep(), guard=dataclasses.replace(guard, spikes="roll_back"))


# In the loop.


def spoil(monkeypatch, weights):
    """Gives the batches of these numbers in their phases other weights: row -> weight each."""
    original = DeviceBatches.__next__

    def spoilt(self):
        batch = original(self)
        if self._place.step not in weights:
            return batch
        rows = np.array(weights[self._place.step], np.float32)[:, None]
        return batch | {"weights": batch["weights"] * rows}

    monkeypatch.setattr(DeviceBatches, "__next__", spoilt)


NAN = [np.nan, 1, 1, 1]
LARGE = [100.0, -99.0, 100.0, -100.0]  # of the sum 1: a gradient of a hundred times the length


def test_rolled_back_and_resumed_equals_straight(tmp_path, monkeypatch):
    """Phase a: batch 3, its last, is NaN. Phase b: so is batch 3, and batch 8, step 11, a spike.
    The other run is stopped where a verdict has not been read yet, and after the way back."""
    guard = Guard(spikes="roll_back", window=4, loss_score=None, gradient_score=20.0)
    changes = {"checkpoint.every": 3, "checkpoint.keep": 1, "guard": guard}
    run = tiny_run(tmp_path, **SMALL, **changes)
    a, b = (dataclasses.replace(run.phases[0], name=n, steps=s) for n, s in (("a", 3), ("b", 10)))
    run = with_phases(run, a, b)
    spoil(monkeypatch, {3: NAN, 8: LARGE})
    straight = train(run, tmp_path / "straight")
    assert straight.progress.step == 13
    # Of a 2 updates; of b the 5 good ones up to its checkpoint 6, and that of its last step.
    assert int(straight.state.step) == int(straight.state.opt_state.count) == 2 + 5 + 1
    assert straight.progress.schedule_start == 2
    told = read_metrics(tmp_path / "straight" / "guard.jsonl")
    assert [(row["step"], row["verdict"], row["phase"], row["batch"]) for row in told] == [
        (3, "non-finite", "a", 3),
        (6, "non-finite", "b", 3),
        (11, "spike", "b", 8),
    ]
    assert [row["rolled_back_to"] for row in told] == [None, None, 9]
    for stop in (6, 11, 12):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            assert train(run, tmp_path / "resumed").progress.step == stop
    resumed = train(run, tmp_path / "resumed")
    assert_same_state(straight.state, resumed.state)
    assert rows(tmp_path / "straight") == rows(tmp_path / "resumed")
    assert told == read_metrics(tmp_path / "resumed" / "guard.jsonl")
    assert [row["skipped"] for row in rows(tmp_path / "resumed") if "skipped" in row] == (
        [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]
    )


def test_too_many_in_a_row_stop_the_run(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, **(SMALL | {"checkpoint.every": 3, "guard.in_a_row": 1}))
    with monkeypatch.context() as patch:
        spoil(patch, {2: NAN, 4: NAN, 5: NAN})
        with pytest.raises(NonFiniteError) as error:
            train(run, tmp_path / "run")
    assert exit_code(error.value) == Exit.NON_FINITE
    assert "not finite at 2 steps in a row, up to step 5" in str(error.value)
    assert str(error.value).endswith(str(tmp_path / "run" / "checkpoints" / "3"))
    status = read_json(tmp_path / "run" / "status.json")
    assert status["state"] == "failed"
    assert status["cause"].startswith("non finite: the loss is not finite at 2 steps in a row")
    # With another guard, whose state is of another shape, it goes on.
    guard = Guard(spikes="skip")
    result = train(dataclasses.replace(run, guard=guard), tmp_path / "run")
    assert result.progress.step == 6
    assert int(result.state.extra[NAME]["seen"]) == 3
    assert int(result.state.step) == 5


POISON = """
    import numpy as np
    from jaxpt.data import device
    to_device, seen = device.to_device, []
    def poisoned(batch, shardings):
        seen.append(0)
        if len(seen) == 3 and int(i) == 1:
            rows = np.array([1e30, -1e30], np.float32)[:, None]
            batch = batch | {"weights": batch["weights"] * rows}
        return to_device(batch, shardings)
    device.to_device = poisoned
    log = loop"""


@pytest.mark.slow
def test_an_infinite_gradient_on_one_of_two_processes(tmp_path, monkeypatch):
    """Both leave the update out, go on, and end alike."""
    run = tiny_run(tmp_path, **SMALL, steps=5)
    script = test_distributed.WORKER.replace("\n    log = loop", POISON, 1)
    assert script != test_distributed.WORKER
    monkeypatch.setattr(test_distributed, "WORKER", script)
    folder = tmp_path / "several" / "run"
    codes, ends = test_distributed.launched(test_distributed.mesh(run, data=4), folder, 2, stop=-1)
    assert codes == [Exit.OK] * 2, ends
    found = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert [row["skipped"] for row in found] == [0, 0, 1, 1, 1]
    assert isinstance(found[2]["loss"], float)
    assert not isinstance(found[2]["grad_norm"], float)
    (told,) = read_metrics(folder / "guard.jsonl")
    assert (told["step"], told["batch"], told["verdict"]) == (3, 3, "non-finite")
