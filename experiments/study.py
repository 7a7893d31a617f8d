"""A study: runs that differ from one base by a line each, over seeds, and a verdict on a claim.

    STUDY = Study(name=..., claim=..., base=run, arms=(Arm("full"), Arm("half", {...})), ...)

    if __name__ == "__main__":
        sys.exit(main(STUDY))

``python -m experiments.NAME`` trains what is not finished yet, each run in a folder of its own
(``jaxpt train``'s, so that one that was cut off goes on), and writes results.json, report.md and
plots. One field (the learning rate, mostly) may be tuned: each arm's values are tried on a seed
that is not reported, by the loss on validation text that is not reported either.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import reports
from experiments.outcomes import outcome_of, stamp, stepper
from experiments.verdicts import Interval, Record, Rule
from jaxpt.data.base import Source
from jaxpt.data.corpus import Corpus
from jaxpt.errors import ConfigError
from jaxpt.files import number, read_json, write_json
from jaxpt.folder import RunFolder, differences
from jaxpt.run import Run, to_json
from jaxpt.train import train, use_compilation_cache
from kernels.timing import interleaved

SIZES = ("smoke", "quick", "full")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the things compared."""

    name: str  # also its folder's: letters, digits, "-" and "_"
    # what differs from the base, as for ``Run.replace``; or a function from the base, as the size
    # has it, to that (of phases that are made of the base's, say)
    changes: Mapping[str, Any] | Callable[[Run], Mapping[str, Any]] = dataclasses.field(
        default_factory=dict
    )
    # of the study's tuned field; the first stands where nothing is tuned
    values: tuple[Any, ...] = ()

    def changes_of(self, run: Run) -> dict[str, Any]:
        return dict(self.changes(run) if callable(self.changes) else self.changes)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of a study is run."""

    changes: Mapping[str, Any]  # to the base, before an arm's own
    seeds: tuple[int, ...] = (0, 1, 2)
    # changes more in the runs that choose each arm's value; None: nothing is tuned
    tuning: Mapping[str, Any] | None = None
    tuning_seed: int = 1000
    arms: tuple[str, ...] | None = None  # those that are run; None: all


@dataclasses.dataclass(frozen=True)
class Study:
    """What a paper claims, and what is run to see."""

    name: str  # its module's
    title: str
    claim: str  # with paper and number, one sentence
    scaled: str  # what is smaller here than there, and why
    base: Run
    arms: tuple[Arm, ...]  # the first is the one that others are measured against
    rule: Rule  # how the verdict is computed
    sizes: Mapping[str, Size]  # of ``SIZES``
    tuned: str | None = None  # a field of the run

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ConfigError("arms", f"two have one name: {', '.join(names)}")
        if missing := self.rule.arms() - set(names):
            raise ConfigError("rule", f"knows arms that there are not: {', '.join(missing)}")
        if unknown := self.sizes.keys() - set(SIZES):
            raise ConfigError("sizes", f"{', '.join(unknown)}: give {', '.join(SIZES)}")
        for label, size in self.sizes.items():
            if unknown := set(size.arms or ()) - set(names):
                raise ConfigError(f"sizes.{label}.arms", f"no such arms: {', '.join(unknown)}")

    def run(self, size: Size, arm: Arm, seed: int, value: Any = None, tuning: bool = False) -> Run:
        """The run of one arm. Raises ConfigError where that cannot be."""
        sized = self.base.replace(
            **{**size.changes, **((size.tuning or {}) if tuning else {})}, seed=seed
        )
        changes = arm.changes_of(sized)
        if self.tuned is not None and value is not None:
            changes[self.tuned] = value
        # Where an arm replaces what holds another field that changes, the replacement comes first.
        holders = {name for name in changes if any(k.startswith(f"{name}.") for k in changes)}
        run = sized.replace(**{k: v for k, v in changes.items() if k in holders})
        return run.replace(**{k: v for k, v in changes.items() if k not in holders})


@dataclasses.dataclass(frozen=True)
class Half(Source):
    """A source with half of its validation documents: every other one."""

    source: Source = Corpus()  # where documents come from
    half: Literal["tuning", "report"] = "report"  # to choose values by, or to report on

    def open(self, split):
        documents = self.source.open(split)
        if split == "train":
            return documents
        return [documents[i] for i in range(self.half == "tuning", len(documents), 2)]


@dataclasses.dataclass(frozen=True)
class Session:
    """A study at one size, in a folder."""

    study: Study
    label: str  # of ``SIZES``
    workdir: Path

    @property
    def size(self) -> Size:
        return self.study.sizes[self.label]

    def go(self, arms: Sequence[str] | None = None) -> None:
        """Trains what is not finished, of the named arms or of the size's: tuning first, then by
        seed, so that all arms have a seed before any has the next."""
        chosen = self.chosen(arms)
        for arm in chosen:
            self.value(arm)
        for seed, arm in itertools.product(self.size.seeds, chosen):
            self.one(arm, seed, self.value(arm))

    def chosen(self, names: Sequence[str] | None) -> list[Arm]:
        """The named arms, else the size's, else all."""
        names = names or self.size.arms
        return [arm for arm in self.study.arms if names is None or arm.name in names]

    def value(self, arm: Arm) -> Any:
        """The tuned field's: the one with the lowest loss of ``tried``."""
        tried = self.tried(arm)
        if not tried:
            return arm.values[0] if arm.values else None
        return min(tried, key=lambda pair: pair[1] if np.isfinite(pair[1]) else np.inf)[0]

    def tried(self, arm: Arm, finished: bool = False) -> list[tuple[Any, float]]:
        """(value, loss) of each; ``finished``: of those that have been run, without running any."""
        if self.size.tuning is None or len(arm.values) < 2:
            return []
        seed, found = self.size.tuning_seed, []
        for value in arm.values:
            record = self.finished(arm, seed, value, True) if finished else None
            if record is None and not finished:
                record = self.one(arm, seed, value, tuning=True)
            if record is not None:
                found.append((value, number(record["loss"])))
        return found

    def folder(self, arm: Arm, seed: int, value: Any, tuning: bool) -> Path:
        name = f"tuning-{value}" if tuning else f"seed-{seed}"
        return self.workdir / self.label / arm.name / name

    def finished(self, arm: Arm, seed: int, value: Any, tuning: bool = False) -> Record | None:
        """What a run came to, if it is finished.

        Raises:
          ConfigError: its folder holds one with other choices.
        """
        folder = self.folder(arm, seed, value, tuning)
        record = read_json(folder / "outcome.json")
        if record is None:
            return None
        run = self.study.run(self.size, arm, seed, value, tuning)
        old, new = read_json(RunFolder(folder).config), json.loads(to_json(run))
        different = differences(old, _known(new, old))
        if record["steps"] != run.phases[-1].total_steps:
            different.append("steps")
        if different:
            raise ConfigError(
                "workdir",
                f"{folder} holds a run with other choices ({', '.join(different)}); "
                "delete it or give another --workdir",
            )
        return record

    def one(self, arm: Arm, seed: int, value: Any, *, tuning: bool = False) -> Record:
        """The record of one run, which is trained unless it is finished."""
        record = self.finished(arm, seed, value, tuning)
        if record is not None:
            return record
        folder = self.folder(arm, seed, value, tuning)
        run = self.study.run(self.size, arm, seed, value, tuning)
        began = time.monotonic()
        result = train(run, folder, restart=True)  # what has no checkpoint begins again
        if result.stopped is not None:
            print(f"stopped by {result.stopped}; the same command goes on from there")
            raise SystemExit(1)
        record = {"arm": arm.name, "seed": seed, "value": value} | outcome_of(result, folder)
        record["wall_seconds"] = time.monotonic() - began
        write_json(folder / "outcome.json", record)
        shutil.rmtree(folder / "checkpoints")  # a finished run is never gone on with
        what = f"tuning {value}" if tuning else f"seed {seed}"
        print(f"{arm.name}, {what}: loss {record['loss']:.4f}", flush=True)
        return record

    def records(self) -> list[Record]:
        """Of every finished run that is reported."""
        found = []
        for arm, seed in itertools.product(self.study.arms, self.size.seeds):
            tried = self.tried(arm, finished=True)
            tuned = self.size.tuning is not None and len(arm.values) > 1
            if tuned and len(tried) < len(arm.values):
                continue
            record = self.finished(arm, seed, self.value(arm))
            if record is not None:
                found.append(record)
        return found

    def results(self) -> dict[str, Any]:
        """All that results.json holds, but for the command and the timing."""
        study, runs = self.study, self.records()
        arms = []
        for arm in study.arms:
            tried = self.tried(arm, finished=True)
            made = arm.changes_of(study.base.replace(**self.size.changes))
            changes = {name: _shown(value) for name, value in made.items()}
            arms.append({"name": arm.name, "changes": changes, "tried": tried})
        done = {(run["arm"], run["seed"]) for run in runs}
        complete = done.issuperset(itertools.product(study.rule.arms(), self.size.seeds))
        verdict = study.rule(runs)
        return {
            "study": study.name,
            "title": study.title,
            "claim": study.claim,
            "scaled": study.scaled,
            "rule": str(study.rule),
            "size": self.label,
            "size_changes": {name: _shown(value) for name, value in self.size.changes.items()},
            "tuned": study.tuned if self.size.tuning is not None else None,
            "seeds": self.size.seeds,
            "arms": arms,
            "runs": runs,
            "outcome": verdict.outcome if complete else "unfinished",
            "relations": _lines(verdict.lines),
            "also": _lines(verdict.also),
            **stamp(),
            "commits": sorted({str(run["commit"]) for run in runs}),
            "date": max((run["date"] for run in runs), default=None),
        }

    def time(self, rounds: int, seconds: float, arms: Sequence[str] | None) -> dict[str, Any]:
        """Tokens a second of the arms' compiled train steps, all in turns; see ``interleaved``.

        What a method does every so many steps alone (a new subspace, a merge) is not in it.
        """
        calls, tokens = {}, {}
        for arm in self.chosen(arms):
            seed = self.size.seeds[0]
            run = self.study.run(self.size, arm, seed, arm.values[0] if arm.values else None)
            calls[arm.name], tokens[arm.name] = stepper(run)
        found = interleaved(calls, rounds=rounds, round_seconds=seconds)
        rates = {
            name: {
                "tokens_per_second": tokens[name] / timing.seconds,
                "low": tokens[name] / timing.high,
                "high": tokens[name] / timing.low,
            }
            for name, timing in found.items()
        }
        return {"rates": rates, "load": os.getloadavg()[0], **stamp()}


def _known(new: Any, old: Any) -> Any:
    """``new`` without the fields that have come since ``old`` was written."""
    if isinstance(new, dict) and isinstance(old, dict):
        return {k: _known(v, old[k]) for k, v in new.items() if k in old}
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        return [_known(a, b) for a, b in zip(new, old, strict=True)]
    return new


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    """The command line of a study's module; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{study.name}", description=f"{study.title}. {study.claim}"
    )
    sizes = parser.add_mutually_exclusive_group()
    for label in set(SIZES) - {"full"}:
        sizes.add_argument(f"--{label}", dest="size", action="store_const", const=label)
    parser.set_defaults(size="full")
    parser.add_argument("--workdir", type=Path, default=Path("runs") / study.name)
    names = [arm.name for arm in study.arms]
    parser.add_argument("--arms", nargs="+", choices=names, help="train or time these alone")
    parser.add_argument(
        "--time-only", action="store_true", help="train nothing; time the arms' steps in turns"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--round-seconds", type=float, default=3.0, help="of an arm in a round")
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing; write the report of what is done"
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write results where the repository keeps them, and the ledger anew",
    )
    options = parser.parse_args(argv)
    session = Session(study, options.size, options.workdir)
    folder = options.workdir / options.size
    if options.publish:
        folder = reports.RESULTS / study.name / options.size
    use_compilation_cache()
    timing = read_json(folder / "results.json", {}).get("timing")
    if options.time_only:
        timing = session.time(options.rounds, options.round_seconds, options.arms)
    elif not options.report_only:
        session.go(options.arms)
    label = [] if options.size == "full" else [f"--{options.size}"]
    command = shlex.join(["python", "-m", f"experiments.{study.name}", *label])
    results = session.results() | {"timing": timing, "command": command}
    write_json(folder / "results.json", results)
    reports.write(folder, results)
    if options.publish:
        reports.write_ledger()
    print(f"{results['outcome']}: {folder / 'report.md'}")
    return 0


def _lines(lines: Sequence[tuple[str, Interval, str]]) -> list[dict[str, Any]]:
    return [
        {"asked": asked, "mean": found.mean, "half": found.half, "outcome": outcome}
        for asked, found, outcome in lines
    ]


def _shown(value: Any) -> str:
    """A config in short: what differs from its defaults."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = [
            f"{field.name}={_shown(getattr(value, field.name))}"
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != _default(field)
        ]
        return f"{type(value).__name__}({', '.join(given)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
