"""``jaxpt checkpoint``: what a run has saved, whether it is whole, and what may go."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from jaxpt.checkpoint import SET_ASIDE, Checkpoints
from jaxpt.errors import ConfigError, DataError, Exit
from jaxpt.files import dumps
from jaxpt.folder import RunFolder
from jaxpt.integrity import DamagedError
from jaxpt.loading import quiet

PARTIAL = "*.orbax-checkpoint-tmp*"  # what orbax calls a save that is under way


def main(action: str, folder: Path, **flags: Any) -> int:
    """``jaxpt checkpoint ACTION DIR``.

    Args:
      action: list, verify or clean.
      folder: the run's.
      flags: of that action.

    Raises:
      ConfigError: the folder holds no run or no checkpoint.
      DataError: verify found damage.
    """
    home = RunFolder(folder)
    if not home.checkpoints.is_dir():
        raise ConfigError("DIR", f"{folder} holds no checkpoints; give the folder of a run")
    return {"list": _list, "verify": _verify, "clean": _clean}[action](home, **flags)


def _list(home: RunFolder, *, json: bool) -> int:
    with quiet(), Checkpoints(home.checkpoints, read_only=True) as checkpoints:
        rows = [_row(checkpoints, step) for step in checkpoints.steps()]
    leftovers = [_relative(home, path) for path in _leftovers(home)]
    if json:
        print(dumps({"folder": str(home.path), "checkpoints": rows, "leftovers": leftovers}))
        return Exit.OK
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name in ("step", "phase", "size", "written (UTC)", "by jax", ""):
        table.add_column(name, justify="right" if name in ("step", "phase", "size") else "left")
    for row in rows:
        phase = "" if row["phase"] is None else str(row["phase"])
        jax, wrong = row["jax"] or "", row["wrong"] or ""
        table.add_row(str(row["step"]), phase, _size(row["bytes"]), row["written"], jax, wrong)
    console = rich.console.Console()
    console.print(table)
    for path in leftovers:
        console.print(f"left over: {path} (jaxpt checkpoint clean removes it)", soft_wrap=True)
    return Exit.OK


def _row(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """What ``list`` tells of one: read without its arrays."""
    folder = checkpoints.folder / str(step)
    written = datetime.datetime.fromtimestamp(folder.stat().st_mtime, datetime.UTC)
    row = {
        "step": step,
        "phase": None,
        "bytes": _bytes(folder),
        "written": f"{written:%Y-%m-%d %H:%M:%S}",
        "jax": None,
        "wrong": None,
    }
    try:
        versions = checkpoints.manifest(step)["versions"]
        phase = checkpoints.progress(step).get("phase")
    except DamagedError as error:
        return row | {"wrong": str(error)}
    return row | {"phase": phase, "jax": versions.get("jax")}


def _verify(home: RunFolder, *, at_step: int | None, json: bool) -> int:
    wrong: dict[int, str] = {}
    with quiet(), Checkpoints(home.checkpoints, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if at_step is not None and at_step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise ConfigError("--at-step", f"there is none of step {at_step}; known: {known}")
        steps = steps if at_step is None else [at_step]
        for step in steps:
            try:
                checkpoints.verify(step)
            except DamagedError as error:
                wrong[step] = str(error)
            if not json and step not in wrong:
                print(f"{checkpoints.folder / str(step)}: whole")
    if json:
        print(dumps({"folder": str(home.path), "steps": steps, "wrong": wrong}))
    if wrong:
        raise DataError("; ".join(wrong.values()))
    return Exit.OK


def _clean(home: RunFolder, *, keep: int | None, dry_run: bool, json: bool) -> int:
    if keep is not None and keep < 1:
        raise ConfigError("--keep", f"{keep} is not valid; keep 1 or more")
    with home.lock():
        going = _leftovers(home)
        with quiet(), Checkpoints(home.checkpoints, read_only=True) as checkpoints:
            steps = checkpoints.steps()
            if keep is not None and len(steps) > keep:
                checkpoints.verify(steps[-1])  # or what goes might be the only good one
                going += [home.checkpoints / str(step) for step in steps[:-keep]]
        freed = sum(map(_bytes, going))
        if not dry_run:
            for path in going:
                shutil.rmtree(path)
    names = [_relative(home, path) for path in going]
    if json:
        print(dumps({"removed": names, "bytes": freed, "dry_run": dry_run}))
        return Exit.OK
    for name in names:
        print(f"{'would remove' if dry_run else 'removed'} {name}")
    print(f"{'would free' if dry_run else 'freed'} {_size(freed)}")
    return Exit.OK


def _leftovers(home: RunFolder) -> list[Path]:
    """Saves that were cut off, and checkpoints that were set aside as damaged."""
    aside = home.path / SET_ASIDE
    found = sorted(home.checkpoints.glob(PARTIAL))
    return found + (sorted(aside.iterdir()) if aside.is_dir() else [])


def _relative(home: RunFolder, path: Path) -> str:
    return str(path.relative_to(home.path))


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
