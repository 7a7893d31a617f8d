"""A run can be made again from its folder, says what it ran on, and why it ended."""

import json
import os
from typing import Any

import jax
import pytest
from tiny import text_files, tiny_run

from jaxpt import cli, determinism, environment
from jaxpt.checkpoint import Checkpoints
from jaxpt.data.loader import Loader
from jaxpt.data.mixture import Mixture
from jaxpt.errors import ConfigError, DataError, Exit, OutOfMemoryError, complain, exit_code
from jaxpt.files import read_json
from jaxpt.run import to_json
from jaxpt.steps import Compiled
from jaxpt.train import main, train

SMALL: dict[str, Any] = {"model.layers": 1, "batch": 4, "length": 32, "steps": 3}


def checksums(folder, step=3):
    """Of every array of a checkpoint: parameters, optimizer, guard."""
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.manifest(step)["arrays"]


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """No compilation cache of the user's own, and no flags that stay."""
    monkeypatch.setenv("JAXPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.setattr("jaxpt.train.use_compilation_cache", lambda: None)


def test_a_run_is_made_again_from_its_folder(tmp_path, quiet, capsys, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    run = tiny_run(tmp_path, **SMALL, deterministic=True)
    train(run, tmp_path / "first")
    (tmp_path / "first" / "checkpoints").rename(tmp_path / "checkpoints")
    again = tmp_path / "first-again"
    assert cli.main(["train", "--from-run", str(tmp_path / "first")]) == Exit.OK
    assert checksums(tmp_path) == checksums(again)
    assert (again / "config.json").read_text() == to_json(run)
    assert "note:" not in capsys.readouterr().err
    (session,) = read_json(again / "environment.json")
    assert session["deterministic"] is True
    assert session["versions"]["jax"] == jax.__version__
    assert session["devices"] == [d.device_kind for d in jax.devices()]
    assert set(session["variables"]) <= set(environment.VARIABLES)
    assert "hunter2" not in json.dumps(session)
    # A session more, and other versions than the last one's.
    session["versions"]["jax"] = "0.1"
    (again / "environment.json").write_text(json.dumps([session]))
    assert f"jax {jax.__version__}, not 0.1" in environment.changes(again)
    train(run.replace(steps=4), again)
    assert [each["step"] for each in environment.sessions(again)] == [0, 3]
    (again / "environment.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="no list of sessions"):
        environment.sessions(again)


def test_what_cannot_be_made_again_is_said(tmp_path, capsys):
    run = tiny_run(tmp_path, **SMALL)
    folder, whole = tmp_path / "run", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    (whole / "config.json").write_text(to_json(run))
    saved = json.loads(to_json(run))
    saved["phases"][0]["objective"]["type"] = "MyObjective"
    (folder / "config.json").write_text(json.dumps(saved))
    for args, words in (
        (["--from-run", str(folder)], "MyObjective"),
        (["--from-run", str(tmp_path / "gone")], "holds no run"),
        (["--from-run", str(whole), "--optimizer.lr", "1"], "--optimizer.lr"),
        (["--from-run", str(whole)], "holds no tokenizer"),
    ):
        assert cli.main(["train", *args]) == Exit.CONFIG
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert words in shown
    assert not (tmp_path / "run-again").exists()


def test_flags_come_before_the_backend(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    determinism.prepare(False)
    monkeypatch.setattr(determinism.xla_bridge, "backends_are_initialized", lambda: False)
    determinism.prepare(True)
    first = os.environ["XLA_FLAGS"]
    assert first.split() == ["--xla_cpu_enable_fast_math=false", *determinism.FLAGS]
    determinism.prepare(True)
    assert os.environ["XLA_FLAGS"] == first
    # A backend that has started needs nothing on CPUs; on GPUs it is too late.
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(determinism.xla_bridge, "backends_are_initialized", lambda: True)
    determinism.prepare(True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match="xla_gpu_deterministic_ops") as error:
        determinism.prepare(True)
    assert error.value.field == "deterministic"
    assert os.environ["XLA_FLAGS"] == ""


def test_data_that_ends_early_is_told(tmp_path, quiet, capsys):
    """The phase is to have 1000 steps, and its only source may be read once."""
    once = Mixture(parts=((text_files(tmp_path / "text"), 1.0),), epochs=(1,))
    run = tiny_run(tmp_path, **(SMALL | {"steps": 1000, "data": once, "length": 512}))
    assert main(run, workdir=tmp_path / "run") == Exit.DATA_ENDED
    status = read_json(tmp_path / "run" / "status.json")
    line = f"the data of phase train ended after {status['step']} steps of 1000"
    assert 0 < status["step"] < 100
    assert (status["state"], status["cause"]) == ("finished", line)
    assert capsys.readouterr().out.splitlines()[-1] == line
    # Once more: nothing is left, and it is said again.
    assert main(run, workdir=tmp_path / "run") == Exit.DATA_ENDED
    assert read_json(tmp_path / "run" / "status.json")["cause"] == line


def test_a_step_that_does_not_fit_says_what_it_needs(tmp_path, monkeypatch, capsys):
    def full(self, *args):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.\nmore")

    monkeypatch.setattr(Compiled, "__call__", full)
    with pytest.raises(OutOfMemoryError) as error:
        train(tiny_run(tmp_path, **SMALL), tmp_path / "run")
    assert exit_code(error.value) == Exit.OUT_OF_MEMORY
    complain(error.value, Exit.OUT_OF_MEMORY)
    shown = capsys.readouterr().err
    assert "allocating 12345 bytes; the train step needs " in shown
    assert "B of state and batch, " in shown
    assert "jaxpt plan CONFIG --topology CHIP:NUMBER --search" in shown
    assert shown.count("\n") == 1
    status = read_json(tmp_path / "run" / "status.json")
    assert status["state"] == "failed"
    assert status["cause"].startswith("out of memory: RESOURCE_EXHAUSTED")


def test_a_batch_is_shown_by_its_number(tmp_path, capsys):
    """What training had as batch 3 of the phase, from the run's folder alone."""
    run = tiny_run(tmp_path, **(SMALL | {"loader.shards": 2, "loader.pack": False}))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(run))
    tokenizer = run.tokenizer.build()
    tokenizer.save(folder / "tokenizer")
    from test_steps import program_of

    with program_of(run).loader(tokenizer) as loader:
        assert isinstance(loader, Loader)
        batches = [next(loader) for _ in range(3)]
    args = ["data", "show", str(folder), "--at-batch", "3", "--count", "99", "--json"]
    assert cli.main(args) == Exit.OK
    shown = json.loads(capsys.readouterr().out)
    assert shown["batches"] == 1
    texts = [tokenizer.decode(row[row != 0]) for row in batches[2]["tokens"]]
    assert [example["tokens"] for example in shown["examples"]] == texts
    assert cli.main([*args[:3], "--at-batch", "0"]) == Exit.CONFIG
    assert "--at-batch: 0 is not valid" in capsys.readouterr().err
