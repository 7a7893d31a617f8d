"""Whether a long run holds on to what it should let go of: memory, files, threads, processes.

    python -m experiments.soak [--steps 2000] [--saves 20] [--evaluations 50] [--workers 2] [--json]

Trains a tiny model by a process of its own, as ``jaxpt train`` does, and watches it from outside
(Linux's /proc): resident memory of the process and of those that make its batches, open files,
threads, children. The slope of memory is the median over pairs of samples (Theil and Sen), in MB
per 100 steps, after the first fifth of the run. Verdict: below 1 MB, no more files, threads and
children at the end than after the first fifth, nothing left behind when it is over.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.chaos_cases import tiny
from experiments.lives import Folder, Lives, alive, descendants, ended, last_words, workers
from jaxpt import environment
from jaxpt.errors import Exit
from jaxpt.objectives import CausalLM
from jaxpt.run import Run

WARM = 0.2  # of the steps
MOST = 1.0  # MB per 100 steps
PAGE = os.sysconf("SC_PAGE_SIZE") / 1e6  # MB


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a process holds at a step; memory in MB."""

    step: int
    memory: float
    workers_memory: float
    files: int
    threads: int
    children: int


def sample(pid: int, step: int) -> Sample | None:
    """None where the process has ended."""
    try:
        files = os.listdir(f"/proc/{pid}/fd")
        threads = os.listdir(f"/proc/{pid}/task")
        memory = resident(pid)
    except OSError:
        return None
    below = descendants(pid)
    return Sample(
        step, memory, sum(map(resident_or_none, workers(pid))), len(files), len(threads), len(below)
    )


def resident(pid: int) -> float:
    """MB in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def resident_or_none(pid: int) -> float:
    with contextlib.suppress(OSError, IndexError):
        return resident(pid)
    return 0.0


def slope(steps: np.ndarray, values: np.ndarray) -> float:
    """Theil and Sen's: the median of the slopes of all pairs, per 100 steps."""
    i, j = np.triu_indices(len(steps), 1)
    apart = steps[j] > steps[i]
    return float(np.median((values[j] - values[i])[apart] / (steps[j] - steps[i])[apart]) * 100)


def watch(run: Run, home: Path, every: int) -> tuple[list[Sample], int]:
    """Trains; a sample every so many steps, and how many processes were left behind."""
    folder = home / "run"
    (process,) = Lives(home).start(run, folder)
    scene, samples, family = Folder(folder), [], set()
    while process.exitcode is None:
        step = int(scene.last_row().get("step", 0))
        if step >= (samples[-1].step + every if samples else 1):
            found = sample(process.pid, step)
            samples += [found] if found else []
            family |= set(descendants(process.pid))
        time.sleep(0.05)
    codes = ended([process])
    assert codes == [Exit.OK], f"exit codes {codes}\n{last_words(folder)}"
    time.sleep(2)
    return samples, sum(map(alive, family))


def verdict(samples: Sequence[Sample], left: int) -> dict[str, Any]:
    """Figures after the warm-up, and what is wrong with them."""
    warm = [s for s in samples if s.step >= WARM * samples[-1].step]
    table = {
        f.name: np.array([getattr(s, f.name) for s in warm]) for f in dataclasses.fields(Sample)
    }
    slopes = {n: slope(table["step"], table[n]) for n in ("memory", "workers_memory")}
    wrong = [
        f"{name} grows by {by:.2f} MB per 100 steps" for name, by in slopes.items() if by >= MOST
    ]
    for name in ("files", "threads", "children"):
        early, late = np.array_split(table[name], 2)
        if np.median(late) > np.median(early) or late.max() > early.max() + 2:
            wrong.append(f"{name}: at most {early.max()} at first, {late.max()} later")
    wrong += [f"{left} processes were left behind"] * bool(left)
    return {
        "samples": len(warm),
        "MB": [round(float(table["memory"][i]), 1) for i in (0, -1)],
        "MB per 100 steps": round(slopes["memory"], 3),
        "MB of workers": [round(float(table["workers_memory"][i]), 1) for i in (0, -1)],
        "MB of workers per 100 steps": round(slopes["workers_memory"], 3),
        **{n: [int(table[n].min()), int(table[n].max())] for n in ("files", "threads", "children")},
        "left": left,
        "wrong": wrong,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--saves", type=int, default=20, help="steps between two saves")
    parser.add_argument("--evaluations", type=int, default=50, help="steps between two")
    parser.add_argument("--workers", type=int, default=2, help="processes that make batches")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    run = tiny(CausalLM(), args.steps).replace(
        **{
            "checkpoint.every": args.saves,
            "evaluate.every": args.evaluations,
            "loader.workers": args.workers,
            "monitor.tensorboard": True,
        }
    )
    home = Path(tempfile.mkdtemp(prefix="jaxpt-soak-"))
    began = time.monotonic()
    samples, left = watch(run, home, max(1, args.steps // 200))
    found = {"steps": args.steps, "saves": args.saves, "evaluations": args.evaluations}
    found |= verdict(samples, left) | {
        "seconds": round(time.monotonic() - began),
        "versions": environment.versions(),
    }
    if args.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name}: {value}")
    shutil.rmtree(home)
    return Exit.BUG if found["wrong"] else Exit.OK


if __name__ == "__main__":
    sys.exit(main())
