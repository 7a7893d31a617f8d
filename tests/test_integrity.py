"""A checkpoint holds what was saved in it, or is not used."""

import functools
import json
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import tiny_run

from jaxpt import cli, integrity
from jaxpt import train as loop
from jaxpt.checkpoint import Checkpoint, Checkpoints
from jaxpt.errors import DataError, Exit
from jaxpt.files import read_json, read_metrics
from jaxpt.folder import RunFolder
from jaxpt.integrity import DamagedError, checksums
from jaxpt.train import train


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint16", "int32", "bool"])
def test_checksums_do_not_depend_on_where_an_array_is(dtype):
    rng = np.random.default_rng(0)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    cut = NamedSharding(mesh, PartitionSpec("a", "b"))
    for shape in ((8, 6), (), (3, 5, 7), (0, 4)):
        x = jnp.asarray(rng.normal(size=shape) * 50).astype(dtype)
        here = checksums({"x": x})["x"]
        assert here == checksums({"x": np.asarray(x)})["x"]
        on_devices = x if len(shape) != 2 or 0 in shape else jax.device_put(x, cut)
        there = jax.jit(integrity._device_sum)(on_devices)
        assert here == "".join(f"{int(s):08x}" for s in there)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_checksums_see_every_changed_entry_and_every_exchange(data):
    size = data.draw(st.integers(2, 40))
    words = st.integers(0, 2**32 - 1)
    x = np.array(data.draw(st.lists(words, min_size=size, max_size=size)), np.uint32)
    at, other = data.draw(st.permutations(range(size)))[:2]
    changed = x.copy()
    changed[at] ^= np.uint32(data.draw(st.integers(1, 2**32 - 1)))
    assert checksums({"x": x}) != checksums({"x": changed})
    swapped = x.copy()
    swapped[[at, other]] = x[[other, at]]
    assert (checksums({"x": x}) == checksums({"x": swapped})) == (x[at] == x[other])


STATE = {"w": jnp.arange(12.0).reshape(3, 4), "n": {"b": jnp.ones(5, jnp.bfloat16)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with the checkpoints 2 and 4; at step s all of the state is multiplied."""
    home = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoint(keep=5).open(home / "checkpoints", "{}") as checkpoints:
        for step in (2, 4):
            state = jax.tree.map(lambda x, step=step: x * step, STATE)
            checkpoints.save(step, state, {"phase": 0, "at": step})
    return home


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run") / "checkpoints"


def asked(dtype=None):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place), STATE
    )


def read(checkpoints, step):
    return step, checkpoints.progress(step)["at"], checkpoints.restore(step, asked())


def newest(folder):
    with Checkpoints(folder) as checkpoints:
        found, bad = checkpoints.newest(functools.partial(read, checkpoints))
        return found, bad, checkpoints.steps()


def test_the_manifest_tells_all_that_was_saved(folder):
    with Checkpoints(folder, read_only=True) as checkpoints:
        manifest = checkpoints.manifest(4)
    assert manifest["step"] == 4
    assert manifest["arrays"]["w"]["shape"] == [3, 4]
    assert manifest["arrays"]["n/b"]["dtype"] == "bfloat16"
    assert manifest["versions"]["jax"] == jax.__version__
    assert len(manifest["config"]) == 64


def files(folder):
    return sorted(p for p in (folder / "4").rglob("*") if p.is_file() and p.stat().st_size)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "gone": lambda path: path.unlink(),
}


def flipped(data: bytes) -> bytes:
    at = len(data) * 2 // 3
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


# orbax abandons its other reads when one fails
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_seen_or_does_no_harm(folder, tmp_path, damage):
    """Each file in turn; then the newest whole checkpoint is what was saved there, always."""
    seen = 0
    for i, path in enumerate(files(folder)):
        copy = shutil.copytree(folder, tmp_path / str(i) / "checkpoints")
        DAMAGES[damage](copy / path.relative_to(folder))
        (step, at, state), bad, left = newest(copy)
        assert at == step
        for name, x in (("w", STATE["w"]), ("b", STATE["n"]["b"])):
            got = state["w"] if name == "w" else state["n"]["b"]
            np.testing.assert_array_equal(np.asarray(got), np.asarray(x * step))
        assert (step == 2) == (4 in bad) == (left == [2])
        if bad:
            seen += 1
            assert str(copy / "4") in bad[4]
            assert (copy.parent / "damaged-checkpoints" / "4").is_dir()
    assert seen >= 4  # the arrays, the progress and the manifest at least


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_emptied_checkpoint_is_passed_over(folder):
    for path in (folder / "4").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (step, _, _), bad, left = newest(folder)
    assert (step, list(bad), left) == (2, [4], [2])


def test_every_bit_of_the_manifest_counts(folder):
    """Also those of a path or a version: else what is asked for would seem not to be there."""
    path = folder / "4" / "manifest" / "metadata"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with Checkpoints(folder, read_only=True) as checkpoints:
            found, bad = checkpoints.newest(functools.partial(read, checkpoints))
        assert found[0] == (4 if not bad else 2)
        if whole[at : at + 1] not in b" \n":  # between the values nothing is said
            assert bad


def test_where_none_is_whole_nothing_is_moved(folder):
    for step in (2, 4):
        shutil.rmtree(folder / str(step) / "manifest")
    with pytest.raises(DataError, match=r"no checkpoint .* is whole: 4: .*; 2: "):
        newest(folder)
    assert {p.name for p in folder.iterdir()} >= {"2", "4"}


def test_other_arrays_than_asked_for_are_no_damage(folder):
    """They must not be passed over in silence: the run has changed, not the files."""
    wanted = asked() | {"more": asked()["w"]}
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(DataError, match="at more it has nothing, the run shape") as found:
            checkpoints.newest(lambda step: checkpoints.restore(step, wanted))
        assert not isinstance(found.value, DamagedError)
        assert checkpoints.steps() == [2, 4]


def test_restores_in_another_type(folder):
    with Checkpoints(folder, read_only=True) as checkpoints:
        state = checkpoints.restore(4, asked("bfloat16"))
    assert state["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(state["w"]), np.asarray((STATE["w"] * 4).astype("bfloat16"))
    )


@pytest.mark.smoke
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, monkeypatch):
    """Bit for bit as if nothing had happened, and it says what did."""
    run = tiny_run(tmp_path, **{"checkpoint.every": 2, "checkpoint.keep": 3})
    straight = train(run, tmp_path / "straight")
    home = shutil.copytree(tmp_path / "straight", tmp_path / "damaged")
    with Checkpoints(home / "checkpoints", read_only=True) as checkpoints:
        steps = checkpoints.steps()
    DAMAGES["truncated"](home / "checkpoints" / str(steps[-1]) / "progress" / "metadata")
    notes: list[str] = []
    monkeypatch.setattr(loop.MonitorSession, "note", lambda self, text: notes.append(text))
    result = train(run, home)
    assert result.progress.step == steps[-1]
    for a, b in zip(jax.tree.leaves(straight.state), jax.tree.leaves(result.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    numbers = [row["step"] for row in read_metrics(home / "metrics.jsonl") if "loss" in row]
    assert numbers == list(range(1, steps[-1] + 1))
    assert any(f"checkpoint {steps[-1]} is damaged and was set aside" in line for line in notes)


def jaxpt(*args):
    return cli.main(["checkpoint", *map(str, args)])


def test_commands(folder, capsys):
    home = folder.parent
    assert jaxpt("list", home, "--json") == Exit.OK
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["bytes"] > 0 and row["wrong"] is None for row in rows)
    assert jaxpt("verify", home) == Exit.OK
    assert "4: whole" in capsys.readouterr().out
    DAMAGES["gone"](folder / "4" / "progress" / "metadata")
    assert jaxpt("verify", home, "--at-step", 2) == Exit.OK
    assert jaxpt("verify", home) == Exit.DATA
    assert str(folder / "4") in capsys.readouterr().err
    assert jaxpt("clean", home, "--keep", 1) == Exit.DATA  # the one to keep is not whole
    assert {p.name for p in folder.iterdir()} >= {"2", "4"}
    newest(folder)
    (folder / "6.orbax-checkpoint-tmp").mkdir()
    capsys.readouterr()
    assert jaxpt("clean", home, "--dry-run") == Exit.OK
    assert "would remove damaged-checkpoints/4" in capsys.readouterr().out
    assert jaxpt("clean", home, "--json") == Exit.OK
    removed = json.loads(capsys.readouterr().out)["removed"]
    assert sorted(removed) == ["checkpoints/6.orbax-checkpoint-tmp", "damaged-checkpoints/4"]
    assert not any((home / path).exists() for path in removed)
    assert jaxpt("verify", home) == Exit.OK
    with RunFolder(home).lock():
        assert jaxpt("clean", home) == Exit.CONFIG
    assert jaxpt("list", home / "nothing") == Exit.CONFIG


FULL_DISK = """
    import pathlib, subprocess, sys
    import numpy as np, jax
    from jaxpt.checkpoint import Checkpoint, Checkpoints
    from jaxpt.errors import Exit, exit_code
    disk = pathlib.Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], check=True)
    home = disk / "checkpoints"
    noise = np.random.default_rng(0).normal(size=150_000).astype("float32")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    def saved(step, n):
        with Checkpoint(keep=9).open(home) as checkpoints:
            checkpoints.save(step, {"w": np.tile(noise, n) * step}, {})
    def check():
        with Checkpoints(home, read_only=True) as checkpoints:
            assert checkpoints.steps() == [1], checkpoints.steps()
            wanted = {"w": jax.ShapeDtypeStruct(noise.shape, "float32", sharding=place)}
            assert (np.asarray(checkpoints.restore(1, wanted)["w"]) == noise).all()
    saved(1, 1)
    for change in ((), ("-o", "remount,ro")):
        if change:
            subprocess.run(["mount", *change, disk], check=True)
        try:
            saved(2, 7)
        except Exception as error:
            code = exit_code(error)
            assert code == Exit.DISK, (code, error)
        else:
            raise AssertionError("nothing was raised")
        check()
"""


def test_a_full_or_read_only_disk_harms_nothing(tmp_path):
    may = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if may.returncode:
        pytest.skip(f"no mount namespaces here: {may.stderr.decode().strip()}")
    (tmp_path / "disk").mkdir()
    command = ["unshare", "-rm", sys.executable, "-c", textwrap.dedent(FULL_DISK)]
    done = subprocess.run(
        [*command, str(tmp_path / "disk")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_status_of_a_run_that_nobody_can_go_on_with(tmp_path):
    run = tiny_run(tmp_path, steps=1)
    train(run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(path / "progress")
    with pytest.raises(DataError, match="is whole"):
        train(run, tmp_path / "run")
    assert read_json(tmp_path / "run" / "status.json")["state"] == "finished"
