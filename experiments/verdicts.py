"""Verdicts of studies: rules stated beforehand, and what the losses say to them.

All arms have the same seeds, and a seed gives all of them the same initial randomness and the same
batches: so arms are compared by the differences of their losses seed by seed, with a 95% interval
of Student's t for the mean difference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import special

Outcome = Literal["held", "not held", "not resolved"]
Record = dict[str, Any]  # of one run: see ``experiments.study.outcome_of``
LEVEL = 0.95  # of every interval


@dataclasses.dataclass(frozen=True)
class Interval:
    """Of a mean: its middle, and half its width (infinite where there is one value)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of level ``LEVEL`` for the mean; of no values it is NaN."""
    if len(values) == 0:
        return Interval(math.nan, math.inf)
    array = np.asarray(values, np.float64)
    if len(array) == 1:
        return Interval(float(array[0]), math.inf)
    t = special.stdtrit(len(array) - 1, (1 + LEVEL) / 2)
    return Interval(float(array.mean()), float(t * array.std(ddof=1) / math.sqrt(len(array))))


def losses(runs: Sequence[Record], arm: str, task: str | None = None) -> dict[int, float]:
    """Seed -> validation loss of an arm's runs: the mean over tasks, or that of one."""
    return {
        run["seed"]: float(run["loss"] if task is None else run["losses"][task])
        for run in runs
        if run["arm"] == arm
    }


def difference(runs: Sequence[Record], left: str, right: str, task: str | None = None) -> Interval:
    """Of right's loss less left's, paired by seed; NaN where no seed has both."""
    ours, theirs = losses(runs, left, task), losses(runs, right, task)
    both = sorted(ours.keys() & theirs.keys())
    return interval([theirs[seed] - ours[seed] for seed in both])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """outcome: of the whole claim. lines: (what was asked, mean difference, its outcome); ``also``:
    of what was asked beside the claim."""

    outcome: Outcome
    lines: tuple[tuple[str, Interval, Outcome], ...]
    also: tuple[tuple[str, Interval, Outcome], ...] = ()


class Rule:
    """How a study's verdict is computed: ``str()`` says it in words, beforehand."""

    def arms(self) -> frozenset[str]:
        """The arms that it needs."""
        raise NotImplementedError

    def __call__(self, runs: Sequence[Record]) -> Verdict:
        """The verdict on the runs that are finished, as far as they go."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Relation:
    """What a claim says of two arms' losses, in nats. With [low, high] the interval of
    right - left:

    "<"    left is lower by more than ``margin``: held where low > margin, contradicted where
           high <= margin
    "<="   left is higher by at most ``margin``: held where low >= -margin, contradicted where
           high < -margin
    "~"    they differ by at most ``margin``: held where [low, high] lies within it, contradicted
           where it lies outside

    Between held and contradicted it is not resolved. ``task``: whose loss; None: the mean.
    """

    left: str
    sign: Literal["<", "<=", "~"]
    right: str
    margin: float = 0.0
    task: str | None = None

    def __str__(self):
        named = f"{self.task}: " if self.task else ""
        margin = f" (margin {self.margin:g})" if self.margin else ""
        return f"{named}{self.left} {self.sign} {self.right}{margin}"

    def outcome(self, found: Interval) -> Outcome:
        if not (math.isfinite(found.mean) and math.isfinite(found.half)):
            return "not resolved"
        margin = self.margin
        held, against = {
            "<": (found.low > margin, found.high <= margin),
            "<=": (found.low >= -margin, found.high < -margin),
            "~": (
                -margin <= found.low and found.high <= margin,
                found.low > margin or found.high < -margin,
            ),
        }[self.sign]
        return "held" if held else "not held" if against else "not resolved"


class Relations(Rule):
    """All relations held: held. One contradicted: not held. Else not resolved.

    ``also`` are judged alike, and reported beside the claim.
    """

    def __init__(self, *relations: Relation, also: Sequence[Relation] = ()):
        self.relations, self.also = relations, tuple(also)

    def __str__(self):
        asked = "; ".join(map(str, self.relations))
        return (
            f"{asked}. Each by the {LEVEL:.0%} interval of the mean difference of validation "
            "losses, paired by seed: held where all of it agrees with the relation, contradicted "
            "where none does. The claim is held if all are, not held if one is contradicted, else "
            "not resolved."
        )

    def arms(self):
        return frozenset(arm for r in self.relations + self.also for arm in (r.left, r.right))

    def __call__(self, runs):
        lines = _judged(self.relations, runs)
        outcomes = {outcome for _, _, outcome in lines}
        whole: Outcome = "held"
        for outcome in ("not resolved", "not held"):
            whole = outcome if outcome in outcomes else whole
        return Verdict(whole, lines, _judged(self.also, runs))


def _judged(relations: Sequence[Relation], runs: Sequence[Record]):
    """The lines of a verdict, of those relations whose arms have runs."""
    arms = {run["arm"] for run in runs}
    lines = []
    for relation in relations:
        if {relation.left, relation.right} <= arms:
            found = difference(runs, relation.left, relation.right, relation.task)
            lines.append((str(relation), found, relation.outcome(found)))
    return tuple(lines)
