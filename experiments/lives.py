"""Processes that train a run, watched from outside: for what kills them, and what waits for leaks.

They are forked from one process that has imported what they need, so that a start costs little;
what they do is ``jaxpt train``. What is read of them is the run's folder and Linux's /proc.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.chaos_cases import EVALUATIONS
from jaxpt.files import read_json, read_row
from jaxpt.run import Run, to_json

PATIENCE = 600.0  # seconds in which what should end by itself has to
QUICK = "--xla_backend_optimization_level=2"  # compiles sooner; below it some programs fail
PRELOAD = ["jaxpt.cli", "jaxpt.train", "jaxpt.doctor", "jaxpt.data.corpus", "optax.contrib"]


class Folder:
    """What a run's folder shows of the process that writes to it."""

    def __init__(self, path: Path, evaluations: int = EVALUATIONS):
        self.path, self.evaluations = path, evaluations

    def last_row(self) -> dict[str, Any]:
        """The last whole line of the metrics."""
        with contextlib.suppress(FileNotFoundError), open(self.path / "metrics.jsonl", "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
            for line in reversed(log.read().split(b"\n")):
                if row := read_row(line):
                    return row
        return {}

    def saving(self) -> bool:
        folder = self.path / "checkpoints"
        return folder.is_dir() and any("tmp" in name for name in os.listdir(folder))

    def moment(self, pid: int) -> str:
        """What the process is at."""
        status = read_json(self.path / "status.json", {})
        row = self.last_row()
        here = status.get("pid") == pid
        begun = here and row.get("step", 0) > (status.get("resumed_from") or 0)
        evaluated = any(name.startswith("eval/") for name in row)
        # Phases are as long as a whole number of intervals only by chance: any evaluation counts.
        # A save goes on in the background: while something is evaluated, too.
        if begun and not evaluated and row["step"] % self.evaluations == 0:
            return "evaluation"
        if self.saving():
            return "save"
        return "step" if begun else "compile" if here else "start"


def train(config: str, folder: str, log: str, cache: str, flags: Sequence[str]) -> None:
    """What a process does: ``jaxpt train``, with its output in a file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"JAXPT_CACHE": cache, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
    from jaxpt import cli

    code = cli.main(["train", config, "--workdir", folder, *flags])
    sys.stdout.flush()
    sys.exit(code)


class Lives:
    """Starts processes of one run; they are forked from one that has imported what they need."""

    def __init__(self, home: Path, processes: int = 1):
        self.home, self.processes = home, processes
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.cache, self._empty = home / "cache", 0

    def start(self, run: Run, folder: Path, *, cold: bool = False) -> list[Any]:
        """The processes of a run, new or going on.

        Args:
          cold: with an empty cache of compiled programs.
        """
        config = folder.with_suffix(".py")
        folder.with_suffix(".run.json").write_text(to_json(run))
        config.write_text(
            "from jaxpt.run import from_json\n"
            f"run = from_json(open({str(folder.with_suffix('.run.json'))!r}).read())\n"
        )
        self._empty += cold
        cache = self.home / f"cache-{self._empty}" if cold else self.cache
        flags, started = [], []
        port = free_port()
        for index in range(self.processes):
            if self.processes > 1:
                flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(self.processes)]
                flags += ["--process-id", str(index)]
            log = folder.with_suffix(f".{index}.log")
            args = (str(config), str(folder), str(log), str(cache), flags)
            process = self.context.Process(target=train, args=args)
            process.start()
            started.append(process)
        return started

    def finish(self, run: Run, folder: Path) -> None:
        """The run to its end, undisturbed. Raises AssertionError where it does not get there."""
        codes = ended(self.start(run, folder))
        assert codes == [0] * len(codes), f"{folder}: exit codes {codes}\n{last_words(folder)}"


def ended(processes: Sequence[Any]) -> list[int | None]:
    """The exit codes of processes that end by themselves, None for what has to be killed."""
    until = time.monotonic() + PATIENCE
    codes: list[int | None] = []
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def last_words(folder: Path) -> str:
    """The ends of what the processes printed."""
    logs = sorted(folder.parent.glob(f"{folder.name}.*.log"))
    return "\n".join(f"{log.name}: ...{log.read_text()[-3000:]}" for log in logs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they did (Linux)."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def workers(pid: int) -> list[int]:
    """Those that make batches (Python's resource tracker is another)."""
    found = []
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            found += [child] * (b"spawn_main" in command)
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
