"""What the program runs on: versions of packages, the commit of jaxpt, hardware, flags."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from jaxpt.errors import DataError
from jaxpt.files import read_json, write_json

PACKAGES = (
    "jaxpt",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)

# Variables that change what is computed. Of others nothing is written down: they may be secret.
VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_NUM_CPU_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
NAME = "environment.json"


def version(package: str) -> str | None:
    """The installed version of a package, or None; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python and those of ``PACKAGES`` that are installed."""
    found = {"python": platform.python_version()}
    return found | {name: v for name in PACKAGES if (v := version(name)) is not None}


def commit() -> str | None:
    """The commit of the source tree that jaxpt runs from, with a plus sign where files differ;
    None where it is installed, or git is not there."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", os.fspath(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def variables() -> dict[str, str]:
    """Those of ``VARIABLES`` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def record(folder: Path, step: int, deterministic: bool) -> None:
    """Adds a session of a run, which goes on at ``step``, to its environment.json. Starts JAX."""
    import jax

    devices = jax.devices()
    session = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "deterministic": deterministic,
        "versions": versions(),
        "commit": commit(),
        "system": platform.platform(),
        "platform": devices[0].platform,
        "devices": [device.device_kind for device in devices],
        "processes": jax.process_count(),
        "variables": variables(),
    }
    write_json(folder / NAME, [*sessions(folder), session])


def sessions(folder: Path) -> list[dict[str, Any]]:
    """Those of a run so far, the first one first. Raises DataError where the file is not ours."""
    try:
        found = read_json(folder / NAME, [])
    except ValueError as error:
        raise DataError(f"{folder / NAME}: {error}") from None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise DataError(f"{folder / NAME}: no list of sessions")
    return found


def changes(folder: Path) -> list[str]:
    """What of the versions is not as in the last session of a run: "jax 0.10.2, not 0.10.1"."""
    before, now = (sessions(folder) or [{}])[-1], versions()
    old = before.get("versions", now)
    found = [
        f"{name} {now.get(name, 'missing')}, not {old.get(name, 'there')}"
        for name in dict.fromkeys([*old, *now])
        if old.get(name) != now.get(name)
    ]
    if before and before.get("commit") != commit():
        found.append(f"commit {commit()}, not {before.get('commit')}")
    return found
