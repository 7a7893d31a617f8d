"""``jaxpt doctor``: what this machine has, and which of its versions are known to be trouble."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpt import environment, hardware
from jaxpt.console import short
from jaxpt.data.cache import cache_folder
from jaxpt.files import dumps

# What each extra of the package brings; one of the distributions installed is enough.
EXTRAS = {
    "tfds": ("tensorflow-datasets",),
    "hf": ("datasets",),
    "parquet": ("pyarrow",),
    "wandb": ("wandb",),
    "tpu": ("libtpu",),
    "cuda12": ("jax-cuda12-plugin",),
    "cuda13": ("jax-cuda13-plugin",),
    "notebook": ("jupyterlab", "notebook", "google-colab"),
    "test": ("pytest",),
}
# jax -> the libtpu that its extra asks for, or that the image which ships it has been tried with.
LIBTPU = {
    "0.7.2": ("0.0.21", "0.0.23"),
    "0.10.2": ("0.0.42",),
    "0.11.1": ("0.0.46",),
    "0.12.0": ("0.0.50",),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a user should know.

    level: "error" stops work, "warning" slows or endangers it, "note" does no harm here.
    """

    level: Literal["error", "warning", "note"]
    what: str
    advice: str


def release(version: str | None) -> tuple[int, ...]:
    """(0, 10, 2) of "0.10.2.dev1"; () of None."""
    numbers = []
    for part in (version or "").split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def known_trouble(versions: Mapping[str, str], platform_name: str) -> list[Finding]:
    """Versions, and pairs of them, with bugs that have cost others time.

    Args:
      versions: package -> version, as ``environment.versions`` gives.
      platform_name: "cpu", "gpu" or "tpu".
    """
    found = []

    def add(level: Literal["error", "warning", "note"], what: str, advice: str) -> None:
        found.append(Finding(level, what, advice))

    jax_version, jaxlib = release(versions.get("jax")), release(versions.get("jaxlib"))
    gpu = platform_name == "gpu"
    if jax_version and jax_version < (0, 7, 2):
        add(
            "error",
            f"jax {versions['jax']} is older than jaxpt supports",
            "pip install 'jax>=0.7.2'",
        )
    if jax_version[:3] != jaxlib[:3]:
        pair = f"jax {versions.get('jax')} with jaxlib {versions.get('jaxlib')}"
        add("error", f"{pair}: they belong together", "reinstall both in one pip command")
    if jaxlib[:3] in ((0, 10, 2), (0, 11, 0)):
        add(
            "warning" if gpu else "note",
            f"jaxlib {versions['jaxlib']}: float32 scatter-add is very slow on NVIDIA GPUs"
            " (openxla/xla 46225)",
            "use jaxlib 0.11.1 or newer (Python 3.12), or 0.10.1" if gpu else "no GPU here",
        )
    if gpu and jax_version[:3] == (0, 7, 2):
        add(
            "warning",
            "jax 0.7.2: cuDNN attention can return a zero gradient for a learned bias",
            "keep learned position biases on the other attention implementations",
        )
    if platform_name == "tpu" and jax_version[:3] == (0, 11, 1):
        add(
            "note",
            "jax 0.11.1: gathers offloaded to SparseCore are slow on TPU 7x (jax 40553)",
            "LIBTPU_INIT_ARGS=--xla_tpu_offload_gather_to_sparsecore=false",
        )
    flax = release(versions.get("flax"))
    if flax >= (0, 12, 8) and jax_version and jax_version < (0, 10):
        pair = f"flax {versions['flax']} with jax {versions['jax']}"
        add("error", f"{pair}: this flax needs jax 0.10 or newer", "pip install 'flax==0.11.2'")
    if release(versions.get("grain"))[:3] == (0, 2, 18):
        add(
            "note",
            "grain 0.2.18: workers fail where absl's flags are not parsed (google/grain 1360)",
            "jaxpt parses them before it starts workers; do the same in code that uses grain alone",
        )
    if release(versions.get("sentencepiece"))[:3] == (0, 2, 1):
        add("error", "sentencepiece 0.2.1 crashes", "pip install 'sentencepiece!=0.2.1'")
    wanted = next((w for v, w in LIBTPU.items() if release(v) == jax_version[:3]), None)
    libtpu = versions.get("libtpu")
    if libtpu and wanted and not any(release(libtpu)[:3] == release(w) for w in wanted):
        add(
            "warning" if platform_name == "tpu" else "note",
            f"libtpu {libtpu} with jax {versions['jax']}, which asks for {' or '.join(wanted)}",
            "pip install -U 'jax[tpu]' moves both together; restart the runtime after it",
        )
    return found


def folder(path: Path, *, measure: bool = True) -> dict[str, Any]:
    """Bytes of what a folder holds (None: not measured), and of what is free on its disk."""
    base = next(p for p in (path, *path.parents) if p.exists())
    files = [f for f in path.rglob("*") if f.is_file()] if measure else []
    size = sum(f.stat().st_size for f in files)
    return {
        "path": str(path),
        "bytes": size if measure else None,
        "disk_free": shutil.disk_usage(base).free,
        "writable": os.access(base, os.W_OK),
    }


def caches() -> dict[str, Path]:
    """Where jaxpt and JAX keep what they would otherwise make again."""
    found = {"jaxpt cache": cache_folder()}
    compiled = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if compiled and "://" not in compiled:
        found["compilation cache"] = Path(compiled)
    return found


def devices() -> tuple[str, list[dict[str, Any]], list[Finding]]:
    """Platform, the devices, and why there are none if the backend does not start."""
    try:
        found = jax.devices()
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
        advice = "check the driver and the installed extra, or set JAX_PLATFORMS=cpu"
        return "none", [], [Finding("error", f"JAX finds no device: {problem}", advice)]
    rows = []
    for device in found:
        chip = hardware.chip(device.device_kind)
        memory = (device.memory_stats() or {}).get("bytes_limit")
        rows.append(
            {
                "id": device.id,
                "kind": device.device_kind,
                "process": device.process_index,
                "memory": memory or (chip.memory if chip else None),
                "peak_flops": chip.flops if chip else None,
                "bandwidth": chip.bandwidth if chip else None,
            }
        )
    return found[0].platform, rows, []


def kernels() -> dict[str, str]:
    """Operation -> the implementation that a large model in bfloat16 gets on one device here.

    What the operations say themselves, once in a process, while programs of usual shapes are traced
    for the device.
    """
    from kernels import attention, block_sparse, cross_entropy
    from kernels.platform import compiling_for

    like, ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16), jnp.int32
    x, row = like((8, 1024, 2048)), jax.ShapeDtypeStruct((8, 1024), ints)
    heads, some = like((8, 1024, 16, 128)), jax.ShapeDtypeStruct((64,), ints)
    weights = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    causal = functools.partial(attention.attention, causal=True)
    product = functools.partial(block_sparse.block_sparse_matmul, d_out=8192)
    traced = {
        "attention": lambda: jax.eval_shape(
            lambda q, segments: causal(q, q, q, segments=segments), heads, row
        ),
        "cross-entropy": lambda: jax.eval_shape(
            lambda *given: cross_entropy.cross_entropy(*given),  # anew: traces are cached
            *(x, like((2048, 32_768)), row, weights),
        ),
        "block-sparse products": lambda: jax.eval_shape(
            product, like((8192, 2048)), like((64, 128, 128)), some, some
        ),
    }
    return {name: _said(trace, compiling_for(jax.devices()[0])) for name, trace in traced.items()}


def _said(trace: Callable[[], Any], target: contextlib.AbstractContextManager[None]) -> str:
    """What is logged by the operations' choices in a trace: "xla: the backend is cpu"."""
    logger, lines = logging.getLogger("kernels"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with target:
            trace()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return "; ".join(line.partition(" by ")[2] or line for line in lines)


def host() -> dict[str, Any]:
    """The machine: system, cores that this process may use, bytes of memory."""
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "executable": sys.executable,
        "cores": cores,
        "memory": pages * os.sysconf("SC_PAGE_SIZE") if pages else None,
    }


def examine() -> dict[str, Any]:
    """All that ``main`` prints, as JSON. Starts the JAX backend."""
    versions = environment.versions()
    platform_name, rows, findings = devices()
    folders = {name: folder(path) for name, path in caches().items()}
    folders["temporary files"] = folder(Path(tempfile.gettempdir()), measure=False)
    findings += known_trouble(versions, platform_name)
    for name, found in folders.items():
        if not found["writable"]:
            findings.append(
                Finding("warning", f"{name}: {found['path']} cannot be written", "set JAXPT_CACHE")
            )
        elif found["disk_free"] < 2e9:
            free = short(found["disk_free"])
            findings.append(Finding("warning", f"{name}: {free}B left on its disk", "make room"))
    return {
        "host": host(),
        "commit": environment.commit(),
        "versions": versions,
        "extras": {
            n: next((v for p in ps if (v := environment.version(p))), None)
            for n, ps in EXTRAS.items()
        },
        "platform": platform_name,
        "devices": rows,
        "folders": folders,
        "kernels": kernels() if rows else {},
        "variables": environment.variables(),
        "findings": [dataclasses.asdict(f) for f in findings],
    }


def main(json: bool = False) -> int:
    """Prints what ``examine`` finds; the exit status is 1 where something stops work."""
    found = examine()
    if json:
        print(dumps(found, indent=2))
    else:
        _show(found)
    return int(any(f["level"] == "error" for f in found["findings"]))


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    machine = found["host"]
    memory = f", {short(machine['memory'])}B of memory" if machine["memory"] else ""
    table.add_row("machine", f"{machine['system']}, {machine['cores']} cores{memory}")
    table.add_row("python", machine["executable"])
    versions = "  ".join(f"{name} {version}" for name, version in found["versions"].items())
    table.add_row("versions", versions)
    table.add_row(
        "extras", "  ".join(f"{n} {v}" for n, v in found["extras"].items() if v) or "none"
    )
    missing = [n for n, v in found["extras"].items() if not v]
    table.add_row("", f"not installed: {', '.join(missing)}" if missing else "")
    table.add_row("devices", "\n".join(_devices(found["devices"])) or "none")
    for name, choice in found["kernels"].items():
        table.add_row(name, choice)
    for name, folder in found["folders"].items():
        size = f"{short(folder['bytes'])}B, " if folder["bytes"] is not None else ""
        table.add_row(name, f"{folder['path']} ({size}{short(folder['disk_free'])}B free)")
    for name, value in found["variables"].items():
        table.add_row(name, value)
    console.print(table)
    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for finding in found["findings"]:
        console.print(
            f"\n{finding['level']}: {finding['what']}",
            style=colours[finding["level"]],
            markup=False,
        )
        console.print(f"  {finding['advice']}", markup=False)
    if not any(f["level"] != "note" for f in found["findings"]):
        console.print("\nNothing here stands in the way.", style="green")


def _devices(rows: list[Mapping[str, Any]]) -> list[str]:
    """One line for each kind of device."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        alike = [row for row in rows if row["kind"] == kind]
        first = alike[0]
        parts = [f"{len(alike)} x {kind}"]
        parts += [f"{short(first['memory'])}B"] if first["memory"] else []
        if first["peak_flops"]:
            parts.append(
                f"{short(first['peak_flops'])}FLOP/s bfloat16, {short(first['bandwidth'])}B/s"
            )
        lines.append(", ".join(parts))
    return lines
