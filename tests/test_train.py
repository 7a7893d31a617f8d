"""The loop: a run that was interrupted is, bit for bit, the run that was not."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from tiny import tiny_run, with_phases

from jaxpt import checkups, examine
from jaxpt.checkpoint import Checkpoints
from jaxpt.data.device import DeviceBatches
from jaxpt.errors import ConfigError
from jaxpt.files import read_json, read_metrics
from jaxpt.folder import RunFolder
from jaxpt.growth.average import Average
from jaxpt.growth.reset import Reset
from jaxpt.growth.stack import Stack
from jaxpt.objectives.causal import CausalLM
from jaxpt.objectives.masked import MaskedLM
from jaxpt.objectives.prefix import PrefixLM
from jaxpt.objectives.span_corruption import SpanCorruption
from jaxpt.objectives.ul2 import UL2
from jaxpt.run import to_json
from jaxpt.state import flatten
from jaxpt.train import train


def arrays(state):
    return {
        path: np.asarray(
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )
        for path, x in flatten(state).items()
    }


def assert_same_state(a, b):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def rows(folder, *drop):
    """The metrics that do not depend on time."""
    timed = {
        "seconds",
        "tokens_per_second",
        "step_seconds",
        "examples_per_second",
        "mfu",
        "input_wait",
        "memory_peak",
    }
    return [
        {
            k: v
            for k, v in row.items()
            if k not in timed and not k.endswith(("_per_second", "seconds"))
        }
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def stop_after(monkeypatch, steps: int):
    """Asks for a stop when so many steps have been taken, as a signal would."""
    from jaxpt import train as loop

    original = loop.MonitorSession.log

    def log(self, step, *args, **kwargs):
        original(self, step, *args, **kwargs)
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.MonitorSession, "log", log)


def stop_inside(monkeypatch, owner, name: str, call: int):
    """Asks for a stop inside the so-manyeth call of a function, which is left there."""
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            raise AssertionError("it was not interrupted")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


# Where a stop is asked for: what does it, and the step that the run stops at.
STOPS = {
    "step": (lambda patch: stop_after(patch, 3), 3),
    "evaluation": (lambda patch: stop_inside(patch, examine, "losses", 2), 4),
    # Twice for every batch: where it is waited for, and where it is taken.
    "wait for data": (lambda patch: stop_inside(patch, DeviceBatches, "fill", 7), 3),
    "samples": (lambda patch: stop_inside(patch, checkups, "samples", 1), 6),
}
OBJECTIVES = [
    pytest.param("decoder", CausalLM(), "evaluation", id="causal", marks=pytest.mark.smoke),
    pytest.param("decoder", PrefixLM(), "wait for data", id="prefix"),
    pytest.param("decoder", MaskedLM(), "samples", id="masked"),
    pytest.param("decoder", UL2(), "step", id="ul2-decoder"),
    pytest.param("encoder_decoder", SpanCorruption(), "step", id="span-corruption"),
    pytest.param("encoder_decoder", UL2(), "step", id="ul2", marks=pytest.mark.smoke),
]


@pytest.mark.parametrize(("kind", "objective", "where"), OBJECTIVES)
def test_stopped_and_resumed_equals_straight(tmp_path, monkeypatch, kind, objective, where):
    run = tiny_run(
        tmp_path, kind=kind, objective=objective, **{"model.dropout": 0.1, "model.scan": True}
    )
    run = dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, every=2))
    straight = train(run, tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop, step = STOPS[where]
        stop(patch)
        stopped = train(run, tmp_path / "resumed")
    assert stopped.stopped == "SIGTERM"
    assert stopped.progress.step == step
    assert read_json(tmp_path / "resumed" / "status.json")["state"] == "stopped"
    resumed = train(run, tmp_path / "resumed")
    assert resumed.stopped is None
    assert_same_state(straight.state, resumed.state)
    assert straight.progress.data == resumed.progress.data  # so the next batch is the same
    assert rows(tmp_path / "straight") == rows(tmp_path / "resumed")
    assert [r["step"] for r in rows(tmp_path / "resumed") if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert straight.results == resumed.results
    assert read_json(tmp_path / "resumed" / "status.json")["state"] == "finished"


def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    """A real process, killed without warning at step 5 of 6, with saves every 2."""
    run = tiny_run(tmp_path, kind="encoder_decoder", objective=UL2(), **{"checkpoint.every": 2})
    straight = train(run, tmp_path / "straight")
    (tmp_path / "run.json").write_text(to_json(run))
    script = textwrap.dedent(f"""
        import os, pathlib, signal, time
        from jaxpt import train as loop
        from jaxpt.run import from_json
        log = loop.MonitorSession.log
        saves = pathlib.Path({str(tmp_path / "killed" / "checkpoints")!r})
        def kill(self, step, *args, **kwargs):
            log(self, step, *args, **kwargs)
            if step == 5:
                while not any((saves / name).is_dir() for name in ("2", "4")):
                    time.sleep(0.02)  # a save goes on in the background
                os.kill(os.getpid(), signal.SIGKILL)
        loop.MonitorSession.log = kill
        run = from_json(open({str(tmp_path / "run.json")!r}).read())
        loop.train(run, {str(tmp_path / "killed")!r})
    """)
    code = subprocess.run([sys.executable, "-c", script], timeout=300).returncode
    assert code == -signal.SIGKILL
    saved = Checkpoints(tmp_path / "killed" / "checkpoints", read_only=True).steps()
    assert saved
    assert 0 < saved[-1] <= 4
    resumed = train(run, tmp_path / "killed")
    assert_same_state(straight.state, resumed.state)
    assert rows(tmp_path / "straight") == rows(tmp_path / "killed")


def two_phases(tmp_path):
    """Causal, then masked, with an average of the parameters in the second."""
    run = tiny_run(tmp_path)
    causal = dataclasses.replace(run.phases[0], name="causal", steps=4)
    masked = dataclasses.replace(
        causal,
        name="masked",
        objective=MaskedLM(),
        steps=5,
        length=64,
        batch=4,
        updates=(Average(decay=0.9),),
    )
    return with_phases(run, causal, masked)


@pytest.mark.parametrize("stops", [(2,), (7,), (4,), (2, 6)], ids=str)
def test_two_phases_with_a_stop_inside_each(tmp_path, monkeypatch, stops):
    run = two_phases(tmp_path)
    straight = train(run, tmp_path / "straight")
    assert straight.progress.phase == 1
    assert straight.progress.step == 9
    for step in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            assert train(run, tmp_path / "resumed").progress.step == step
    resumed = train(run, tmp_path / "resumed")
    assert_same_state(straight.state, resumed.state)
    assert rows(tmp_path / "straight") == rows(tmp_path / "resumed")
    phases = [r["phase"] for r in rows(tmp_path / "resumed") if "loss" in r]
    assert phases == ["causal"] * 4 + ["masked"] * 5


def test_second_phase_keeps_or_drops_the_optimizer(tmp_path):
    """Kept: counts go on, and the schedule starts anew. Dropped: moments and counts are fresh."""
    for keep, count in ((True, 9), (False, 5)):
        run = two_phases(tmp_path)
        second = dataclasses.replace(run.phases[1], keep_optimizer=keep)
        result = train(with_phases(run, run.phases[0], second), tmp_path / f"keep-{keep}")
        counts = {
            int(x) for path, x in flatten(result.state.opt_state).items() if path.endswith("count")
        }
        assert counts == {count}
        assert result.progress.schedule_start == (4 if keep else 0)


def test_examples_and_epochs_and_seconds_end_a_phase(tmp_path):
    run = tiny_run(tmp_path)
    examples = run.replace(examples=20)
    assert train(examples, tmp_path / "examples").progress.step == round(20 / 8)
    epochs = run.replace(epochs=2)
    result = train(epochs, tmp_path / "epochs")
    once = train(run.replace(epochs=1), tmp_path / "epoch").progress.step
    assert once <= result.progress.step <= 2 * once
    seconds = train(run.replace(seconds=0.5), tmp_path / "seconds")
    assert seconds.progress.phase_seconds >= 0.5


def test_folder_is_never_silently_restarted(tmp_path):
    run = tiny_run(tmp_path, steps=2)
    train(run, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"other choices .*model\.width"):
        train(run.replace(**{"model.width": 32}), tmp_path / "run")
    # What does not change the computation may change.
    assert (
        train(run.replace(**{"steps": 3, "monitor.every": 5}), tmp_path / "run").progress.step == 3
    )
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / f"gone-{checkpoint.name}")
    with pytest.raises(ConfigError, match="--restart"):
        train(run.replace(steps=3), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert train(run.replace(steps=3), tmp_path / "run", restart=True).progress.step == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        train(run, tmp_path / "other")
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == [".lock", "notes.txt"]


def test_what_the_second_phase_cannot_do_is_said_before_the_first(tmp_path):
    run = two_phases(tmp_path)
    first, second = run.phases
    deeper = dataclasses.replace(second, model=dataclasses.replace(run.model, layers=4))
    with pytest.raises(ConfigError, match=r"phases\.masked\.begin: the model changes"):
        train(with_phases(run, first, deeper), tmp_path / "run")
    lost = dataclasses.replace(second, begin=(Reset(patterns=("nothing/*",)),))
    with pytest.raises(ConfigError, match=r"phases\.masked\.begin\.0\.patterns.*nothing"):
        train(with_phases(run, first, lost), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    grown = dataclasses.replace(deeper, begin=(Stack(),))
    result = train(with_phases(run, first, grown), tmp_path / "run")
    assert result.program.model.config.layers == 4
    assert result.progress.step == 9


def test_two_processes_cannot_share_a_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock(), pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
        train(tiny_run(tmp_path), folder.path)
    train(tiny_run(tmp_path, steps=1), folder.path)  # free again


def test_keep_best_keeps_the_lowest_loss(tmp_path):
    from jaxpt.checkpoint import Checkpoint

    state = {"w": jax.numpy.zeros(3)}
    with Checkpoint(keep=1, keep_best=1, keep_every=4).open(tmp_path / "c") as checkpoints:
        for step, loss in enumerate([5.0, 1.0, 3.0, 2.0, 4.0, 4.0, 6.0], 1):
            checkpoints.save(step, state, {"step": step}, loss)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 7]
        assert checkpoints.progress(4) == {"step": 4}


def test_compiles_each_step_once(tmp_path, caplog):
    """One train step and one eval step, whatever is evaluated, saved and accumulated."""
    run = tiny_run(
        tmp_path,
        objective=UL2(),
        **{"evaluate.every": 2, "checkpoint.every": 2, "step.accumulate": 2},
    )
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train(run, tmp_path / "run")
    compiled = [
        r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()
    ]
    steps = [m for m in compiled if "jit(step)" in m]
    assert len(steps) == 2, compiled


def test_dispatch_waits_for_nothing(tmp_path):
    """The loop reads a step's metrics only after the next one has been dispatched."""
    from jaxpt.program import Program

    run = tiny_run(tmp_path)
    tokenizer = run.tokenizer.build()
    program = Program(run, 0, tokenizer.vocabulary, run.mesh.build())
    state, key = program.init(jax.random.key(0)), jax.random.key(1)
    with program.batches(tokenizer) as batches:
        batch = next(batches)
        state, _ = program.train_step(state, batch, key)
        with jax.transfer_guard("disallow"):  # neither a copy to the device nor back
            began = time.monotonic()
            for _ in range(3):
                state, metrics = program.train_step(state, batch, key)
            assert time.monotonic() - began < 60
    assert np.isfinite(float(metrics["loss"][0]))
