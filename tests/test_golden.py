"""Folders that were written before: by other versions of JAX, and under names that have changed."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from jaxpt import migrations
from jaxpt.checkpoint import Checkpoint, Checkpoints
from jaxpt.errors import ConfigError, DataError
from jaxpt.files import read_json, read_metrics
from jaxpt.folder import RunFolder
from jaxpt.growth import Convert
from jaxpt.loading import load
from jaxpt.mesh import Mesh, single
from jaxpt.migrations import Renamed
from jaxpt.optimizers import Lion
from jaxpt.program import Program
from jaxpt.run import from_json, to_json
from jaxpt.start import open_start
from jaxpt.state import flatten
from jaxpt.train import train

FOLDERS = sorted((pathlib.Path(__file__).parent / "golden").glob("format-*"))
SMALL = 100_000  # bytes of each


def test_there_is_one_of_this_format_and_all_are_small():
    """``python tests/golden/make.py`` writes one."""
    assert any(path.name.startswith(f"format-{migrations.FORMAT}-") for path in FOLDERS)
    for folder in FOLDERS:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < SMALL, folder


@pytest.mark.smoke
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_golden_run_goes_on_as_it_would_have_then(tmp_path, folder):
    """The state is held against its checksums; the losses of the next steps tell the rest: data,
    mixture, schedule, moments."""
    home = shutil.copytree(folder, tmp_path / "run")
    with Checkpoints(home / "checkpoints", read_only=True) as checkpoints:
        (step,) = checkpoints.steps()
        checkpoints.verify(step)
    train(RunFolder(home).load(), home)
    assert not (home / "damaged-checkpoints").exists()
    rows = read_metrics(home / "metrics.jsonl")
    losses = {str(row["step"]): row["loss"] for row in rows if "loss" in row}
    assert losses == pytest.approx(read_json(folder / "losses.json"), rel=1e-5)


def test_parameters_go_elsewhere(tmp_path):
    """Into another optimizer and another type, on another mesh, layers stacked otherwise."""
    golden = load(FOLDERS[0], layout=single())
    changes = {
        "start_from": str(FOLDERS[0]),
        "optimizer": Lion(),
        "updates": (),
        "begin": (Convert(),),
        "model.dtype": "bfloat16",
        "model.scan": not golden.run.model.scan,  # pyright: ignore[reportAttributeAccessIssue]
    }
    run = golden.run.replace(**changes).replace(mesh=Mesh(data=2, fsdp=2, devices=4))
    home = RunFolder(tmp_path / "run")
    source = open_start(run, home)
    assert source is not None
    program = Program(run, 0, golden.tokenizer.vocabulary, run.mesh.build())
    program.check(start=source.model)
    state = source.state(program, jax.random.key(0))
    found = flatten(state.params)
    assert {x.dtype.name for x in found.values() if x.dtype.kind == "V" or x.ndim > 1} >= {
        "bfloat16"
    }
    assert max(len(x.sharding.device_set) for x in found.values()) == 4
    wanted = flatten(golden.params)
    name = next(path for path in wanted if path.startswith("embed"))
    np.testing.assert_array_equal(
        np.asarray(found[name]), np.asarray(wanted[name].astype("bfloat16"))
    )


# Names that have changed. The arrays are small, and nothing is compiled.

W, ONES = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float32)
OLD = {
    "params": {"old": {"w": W}, "layers_1": {"mlp": {"w": ONES}}},
    "opt_state": {"states": {"old": {"w": {"m": 2 * W}}}, "older": np.float32(3)},
}
ROWS = (
    Renamed(1, "older", "never: this came before it was written"),
    Renamed(2, "old", "new"),
    Renamed(2, r"layers_(\d+)/mlp", r"layers/\1/feed_forward"),
    Renamed(3, "new", "newer"),
)
NEW = {
    "params/newer/w": "params/old/w",
    "params/layers/1/feed_forward/w": "params/layers_1/mlp/w",
    "opt_state/states/newer/w/m": "opt_state/states/old/w/m",
    "opt_state/older": "opt_state/older",
}


@pytest.fixture
def renamed(tmp_path, monkeypatch):
    """The checkpoints of a folder that was written in format 1, read in format 3."""
    with Checkpoint().open(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, OLD, {"phase": 0})
    monkeypatch.setattr(migrations, "FORMAT", 3)
    monkeypatch.setattr(migrations, "ARRAYS", ROWS)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        yield checkpoints


def abstract(paths):
    """The state that the paths stand for, as it is asked for."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    old, asked = flatten(OLD), {}
    for path in paths:
        *parents, last = path.split("/")
        node = asked
        for name in parents:
            node = node.setdefault(name, {})
        x = old[NEW[path]]
        node[last] = jax.ShapeDtypeStruct(x.shape, np.float32, sharding=place)
    return asked


def test_a_renamed_module_is_found_under_its_new_name(renamed):
    found = flatten(renamed.restore(1, abstract(NEW)))
    for path, old in NEW.items():
        np.testing.assert_array_equal(found[path], flatten(OLD)[old], err_msg=path)
    params = renamed.restore_params(1, abstract(p for p in NEW if p[0] == "p")["params"])
    np.testing.assert_array_equal(params["newer"]["w"], OLD["params"]["old"]["w"])
    renamed.verify(1)


def test_a_name_that_no_row_speaks_of_is_missed(renamed, monkeypatch):
    monkeypatch.setattr(migrations, "ARRAYS", ROWS[:2])
    with pytest.raises(DataError, match=r"newer/w.* it has nothing"):
        renamed.restore(1, abstract(NEW))


def test_a_later_format_is_refused_and_not_set_aside(renamed, monkeypatch):
    monkeypatch.setattr(migrations, "FORMAT", 0)
    with pytest.raises(DataError, match="written by a later jaxpt, in format 1; this one"):
        renamed.newest(renamed.progress)
    assert (renamed.folder / "1").is_dir()


def test_a_class_of_the_config_that_has_moved(monkeypatch):
    run = RunFolder(FOLDERS[0]).load()
    old = to_json(run).replace("jaxpt.models.mlp:MLP", "jaxpt.blocks:FeedForward")
    assert old != to_json(run)
    with pytest.raises(ConfigError, match=r"jaxpt\.blocks:FeedForward"):
        from_json(old)
    monkeypatch.setitem(migrations.CLASSES, "jaxpt.blocks:FeedForward", "jaxpt.models.mlp:MLP")
    assert from_json(old) == run
