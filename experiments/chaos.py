"""Whether a run that is killed again and again ends as the one that was left alone: bit for bit.

    python -m experiments.chaos --kills 50 [--processes 2] [--case NAME] [--seed N] [--json]
    python -m experiments.chaos --kills 20 --signal TERM

Every case is trained once without a disturbance, and once by processes that are ended by SIGKILL
from outside, each a real one that does what ``jaxpt train`` does, and started again each time. In
the end parameters, optimizer state, position in the data and metrics.jsonl have to be the same, no
step twice and none missing, and no process may be left of those that were killed.

When to kill is drawn from the seed: at a time, or as soon as the run's folder shows a moment, and
a little later. Moments:

    start       interpreter, restoring, the first state
    compile     from the first word of the run to its first step, with no program in the cache
    step        between two lines of metrics.jsonl
    evaluation  the line of a step is there, the losses of its evaluation are not
    save        orbax's temporary folder is there, so that a save is under way in the background
    worker      in place of the run a process that makes its batches: the run has to end by itself

A process of several is killed alone; the others have to end by themselves. With another signal all
of them have to save and end in time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.chaos_cases import CASES, of_processes
from experiments.lives import Folder, Lives, alive, descendants, ended, last_words, workers
from jaxpt import environment
from jaxpt.checkpoint import Checkpoints
from jaxpt.errors import Exit
from jaxpt.files import read_json, read_metrics
from jaxpt.loading import quiet
from jaxpt.run import Run

MOMENTS = ("start", "compile", "step", "evaluation", "save", "worker", "time")
LATER = {"start": 0.8, "compile": 1.5, "step": 0.03, "evaluation": 0.03, "save": 0.08}  # seconds
STEPS = 24
TRIES = 2  # at a moment that a run may come to its end before


@dataclasses.dataclass(frozen=True)
class Kill:
    """One that is to happen: at the ``nth`` time that the moment is seen in a process's life."""

    moment: str
    nth: int = 1  # for "time" and "start": not used
    after: float = 0.0  # seconds after it was seen; for those two: after the process was started
    victim: int = 0  # of several processes
    number: signal.Signals = signal.SIGKILL


@dataclasses.dataclass
class Blow:
    """A kill that happened: ``moment`` is what the run was at, ``step`` its last one by then."""

    meant: str
    moment: str
    step: int
    number: signal.Signals
    codes: list[int | None]
    left: int  # processes that outlived it
    seconds: float  # until all had ended

    @property
    def expected(self) -> bool:
        """Whether it ended as it should, and all of it. A signal may come before a run takes it,
        and after its last step."""
        stopped = 128 + self.number
        if self.number == signal.SIGKILL:
            return set(self.codes) <= {-signal.SIGKILL, Exit.LOST_PROCESS} and not self.left
        return set(self.codes) <= {stopped, -self.number, 0} and not self.left


def strike(lives: Lives, run: Run, folder: Path, kill: Kill) -> Blow | None:
    """Starts the run, and kills it; None where it came to its end before."""
    scene = Folder(folder)
    processes = lives.start(run, folder, cold=kill.moment == "compile")
    first, victim = processes[0], processes[kill.victim]
    began, seen, at, due = time.monotonic(), 0, None, None
    if kill.moment in ("time", "start"):
        due = began + kill.after
    while all(process.exitcode is None for process in processes):
        now, moment = time.monotonic(), scene.moment(first.pid)
        if due is None:
            hit = moment == ("step" if kill.moment == "worker" else kill.moment)
            hit = hit and (kill.moment != "worker" or bool(workers(victim.pid)))
            here = scene.last_row().get("step", 0) if hit else None
            seen += hit and here != at
            at = here
            if seen >= kill.nth:
                due = now + kill.after
        if due is not None and now >= due:
            return land(processes, kill, scene, moment)
        time.sleep(0.001)
    codes = ended(processes)
    assert codes == [0] * len(codes), f"nobody was killed: {codes}\n{last_words(folder)}"
    return None


def land(processes: Sequence[Any], kill: Kill, scene: Folder, moment: str) -> Blow:
    """Kills; and waits for what should end by itself."""
    step = scene.last_row().get("step", 0)
    family = [pid for process in processes for pid in descendants(process.pid)]
    victim = processes[kill.victim]
    if kill.moment == "worker" and (own := workers(victim.pid)):
        moment = "worker"
        os.kill(own[step % len(own)], signal.SIGKILL)
    else:  # at the start, those who wait for one that never came would wait long
        for process in processes if moment == "start" else [victim]:
            os.kill(process.pid, kill.number)
    began = time.monotonic()
    codes = ended(processes)
    seconds = time.monotonic() - began
    until = time.monotonic() + 10
    while (left := [pid for pid in family if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.02)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    number = signal.SIGKILL if moment == "worker" else kill.number
    return Blow(kill.moment, moment, step, number, codes, len(left), seconds)


def plan(
    random: random.Random, processes: int, moments: Sequence[str], number: signal.Signals
) -> Iterator[Kill]:
    """Kills without end, every moment in turn in an order that is drawn."""
    while True:
        for moment in random.sample(moments, len(moments)):
            most = 6.0 if moment == "time" else LATER.get(moment, 0.0)
            nth = random.choice((1, 1, 2, 3)) if moment in ("step", "save", "evaluation") else 1
            yield Kill(moment, nth, random.uniform(0, most), random.randrange(processes), number)


def timeless(value: Any) -> Any:
    """JSON without what a clock had a say in."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.endswith(("seconds", "per_second"))}
        return {k: timeless(v) for k, v in kept.items() if k not in ("mfu", "input_wait")}
    return value


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs in their folders, apart from time."""
    wrong = []
    with quiet():
        opened = [Checkpoints(home / "checkpoints", read_only=True) for home in (one, other)]
        steps = [checkpoints.steps()[-1] for checkpoints in opened]
        if steps[0] != steps[1]:
            return [f"the last checkpoints are of steps {steps}"]
        manifests = [timeless(checkpoints.manifest(steps[0])) for checkpoints in opened]
        paths = [sorted(manifest["arrays"]) for manifest in manifests]
        if paths[0] != paths[1] or manifests[0]["config"] != manifests[1]["config"]:
            wrong.append("the arrays or the config are not the same")
        for path in paths[0]:
            arrays = [np.asarray(c.array(steps[0], path)) for c in opened]
            if arrays[0].dtype != arrays[1].dtype or arrays[0].tobytes() != arrays[1].tobytes():
                wrong.append(f"{path} differs")
        places = [timeless(checkpoints.progress(steps[0])) for checkpoints in opened]
        wrong += ["the position in the data or the log differs"] * (places[0] != places[1])
        for checkpoints in opened:
            checkpoints.close()
    rows = [
        [timeless(row) for row in read_metrics(home / "metrics.jsonl")] for home in (one, other)
    ]
    wrong += ["the rows of metrics.jsonl differ"] * (rows[0] != rows[1])
    numbers = [row["step"] for row in rows[1]]
    wrong += [f"the steps of metrics.jsonl are {numbers}"] * (
        numbers != list(range(1, steps[1] + 1))
    )
    states = [(read_json(home / "status.json") or {}).get("state") for home in (one, other)]
    wrong += [f"the runs say that they are {states}"] * (states != ["finished"] * 2)
    leftover = [p.name for p in (other / "checkpoints").iterdir() if "tmp" in p.name]
    return wrong + [f"left over: {name}" for name in leftover]


def ordeal(
    lives: Lives,
    name: str,
    run: Run,
    kills: Iterable[Kill],
    count: int,
    told: Callable[[str], None] = lambda line: None,
) -> tuple[list[Blow], list[str]]:
    """Trains a run straight, and again with so many kills.

    Returns:
      (the kills, what went wrong).
    """
    run = of_processes(run, lives.processes)
    straight, folder = lives.home / f"{name}-straight", lives.home / name
    lives.finish(run, straight)
    blows: list[Blow] = []
    wrong: list[str] = []
    for kill in kills:
        blow = None
        for _ in range(TRIES):
            if blow := strike(lives, run, folder, kill):
                break
            wrong += differences(straight, folder)  # it is done: the kill falls on another one
            shutil.rmtree(folder)
            told(f"{name}: finished after {len(blows)} kills")
        if blow is None:
            continue
        blows.append(blow)
        told(
            f"{name}: {blow.number.name} at {blow.moment} (step {blow.step}): exit codes "
            f"{blow.codes} after {blow.seconds:.1f} s"
        )
        if not blow.expected:
            wrong.append(f"{blow} was not expected")
            told(last_words(folder))
        if len(blows) == count:
            break
    lives.finish(run, folder)
    return blows, wrong + differences(straight, folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--processes", type=int, default=1, help="of each run")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="default: all")
    parser.add_argument("--moment", action="append", choices=MOMENTS, help="default: all")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=None, help="default: another every time")
    parser.add_argument("--keep", type=Path, help="folder for the runs (default: removed)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    out = sys.stderr if args.json else sys.stdout
    print(f"seed {seed}", file=out, flush=True)
    names = args.case or list(CASES)
    home = args.keep or Path(tempfile.mkdtemp(prefix="jaxpt-chaos-"))
    home.mkdir(parents=True, exist_ok=True)
    blows: list[Blow] = []
    wrong: dict[str, list[str]] = {}
    began = time.monotonic()
    for i, name in enumerate(names):
        lives = Lives(home, args.processes)
        own = random.Random(f"{seed} {name} {args.processes}")
        count = (i + 1) * args.kills // len(names) - i * args.kills // len(names)
        if not count:
            continue
        run = CASES[name](args.steps)
        moments = [m for m in args.moment or MOMENTS if m != "worker" or run.loader.workers]
        number = signal.Signals[f"SIG{args.signal}"]
        kills = plan(own, args.processes, moments, number)
        try:
            found, wrong[name] = ordeal(
                lives, name, run, kills, count, lambda line: print(line, file=out, flush=True)
            )
            blows += found
        except AssertionError as error:
            wrong[name] = [str(error)]
    result = {
        "seed": seed,
        "kills": len(blows),
        "signal": args.signal,
        "processes": args.processes,
        "cases": [name for name in names if name in wrong],
        "by moment": dict(collections.Counter(blow.moment for blow in blows)),
        "wrong": {name: lines for name, lines in wrong.items() if lines},
        "longest end": round(max((blow.seconds for blow in blows), default=0.0), 1),
        "seconds": round(time.monotonic() - began),
        "versions": environment.versions(),
    }
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
    if not args.keep and not result["wrong"]:
        shutil.rmtree(home)
    elif result["wrong"]:
        print(f"the runs are in {home}", file=out)
    return Exit.BUG if result["wrong"] else Exit.OK


if __name__ == "__main__":
    sys.exit(main())
