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
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.chaos_cases import CASES, EVALUATIONS, of_processes
from jaxpt import environment
from jaxpt.checkpoint import Checkpoints
from jaxpt.errors import Exit
from jaxpt.files import read_json, read_metrics, read_row
from jaxpt.loading import quiet
from jaxpt.run import Run, to_json

MOMENTS = ("start", "compile", "step", "evaluation", "save", "worker", "time")
LATER = {"start": 0.8, "compile": 1.5, "step": 0.03, "evaluation": 0.03, "save": 0.08}  # seconds
PATIENCE = 600.0  # seconds in which what should end by itself has to
STEPS = 24
PRELOAD = ["jaxpt.cli", "jaxpt.train", "jaxpt.doctor", "jaxpt.data.corpus", "optax.contrib"]


@dataclasses.dataclass(frozen=True)
class Kill:
    """One that is to happen: at the ``nth`` time that the moment is seen in a process's life."""

    moment: str
    nth: int = 1  # for "time" and "start": not used
    after: float = 0.0  # seconds after it was seen; for those two: after the process was started
    victim: int = 0  # of several processes
    number: signal.Signals = signal.SIGKILL


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
        if self.saving():
            return "save"
        status = read_json(self.path / "status.json", {})
        if status.get("pid") != pid:
            return "start"
        row = self.last_row()
        if row.get("step", 0) <= (status.get("resumed_from") or 0):
            return "compile"
        # Phases are as long as a whole number of intervals only by chance: any evaluation counts.
        evaluated = any(name.startswith("eval/") for name in row)
        return "step" if evaluated or row["step"] % self.evaluations else "evaluation"


def train(config: str, folder: str, log: str, cache: str, flags: Sequence[str]) -> None:
    """What a process does: ``jaxpt train``, with its output in a file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"JAXPT_CACHE": cache, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
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
    kills: Iterator[Kill],
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
    while len(blows) < count:
        blow = strike(lives, run, folder, next(kills))
        if blow is None:  # the run is done: the rest of the kills fall on another one
            wrong += differences(straight, folder)
            shutil.rmtree(folder)
            told(f"{name}: finished after {len(blows)} kills")
            continue
        blows.append(blow)
        told(
            f"{name}: {blow.number.name} at {blow.moment} (step {blow.step}): exit codes "
            f"{blow.codes} after {blow.seconds:.1f} s"
        )
        if not blow.expected:
            wrong.append(f"{blow} was not expected")
            told(last_words(folder))
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
