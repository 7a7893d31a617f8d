"""How good answers are: figures of all cases of a split at once, in plain numpy.

A figure takes (predictions, cases, labels) and gives a number; ``figures`` computes several. What a
prediction is follows from the case: the class's number (-1: none), a score, a text, or the classes
of the words.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxpt.data.labelled import Case
from jaxpt.errors import ConfigError

Figure = Callable[[Sequence[Any], Sequence[Case], Sequence[str]], float]


def accuracy(predictions, cases, labels) -> float:
    """Share of the classes (of words: over all words) that are right."""
    said = np.concatenate([np.atleast_1d(p) for p in predictions])
    right = np.concatenate([np.atleast_1d(case.label) for case in cases])
    return float(np.mean(said == right))


def f1(predictions, cases, labels) -> float:
    """Of class 1, of two: 2 TP / (2 TP + FP + FN); 0 where there is none. No class is wrong."""
    right = np.array([case.label for case in cases])
    said = np.array(predictions)
    said = np.where(said < 0, 1 - right, said)
    return _f1_of(said == 1, right == 1)


def macro_f1(predictions, cases, labels) -> float:
    """The mean of the classes' F1."""
    right, said = np.array([case.label for case in cases]), np.array(predictions)
    return float(np.mean([_f1_of(said == c, right == c) for c in range(len(labels))]))


def matthews(predictions, cases, labels) -> float:
    """Matthews' correlation; of more than two classes Gorodkin's R_K (2004, eq. 8). 0 where one
    side has one class alone."""
    right, said = np.array([case.label for case in cases]), np.array(predictions)
    classes = np.unique(np.concatenate([right, said]))
    x, y = ((side[:, None] == classes).astype(np.float64) for side in (right, said))
    x, y = x - x.mean(0), y - y.mean(0)
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale else 0.0


def pearson(predictions, cases, labels) -> float:
    """Pearson's correlation of scores; 0 where one side is constant."""
    right = np.array([case.label for case in cases], np.float64)
    return _correlation(np.array(predictions, np.float64), right)


def spearman(predictions, cases, labels) -> float:
    """Spearman's: Pearson's of the ranks, equal scores sharing the mean of theirs."""
    right = np.array([case.label for case in cases], np.float64)
    return _correlation(_ranks(np.array(predictions, np.float64)), _ranks(right))


def exact_match(predictions, cases, labels) -> float:
    """Share of the texts that are one of the answers, after ``normal`` (SQuAD; Rajpurkar et al.
    2016, section 6.1)."""
    pairs = zip(predictions, cases, strict=True)
    return float(np.mean([any(normal(p) == normal(a) for a in c.answers) for p, c in pairs]))


def token_f1(predictions, cases, labels) -> float:
    """The mean of the words' F1 with the answer that gives the most (as ``exact_match``)."""
    pairs = zip(predictions, cases, strict=True)
    return float(np.mean([max((_overlap(p, a) for a in c.answers), default=0.0) for p, c in pairs]))


def group_exact_match(predictions, cases, labels) -> float:
    """Share of the groups of which every case is right (MultiRC's questions)."""
    groups: dict[Any, bool] = {}
    for said, case in zip(predictions, cases, strict=True):
        groups[case.group] = groups.get(case.group, True) and said == case.label
    return float(np.mean(list(groups.values())))


def entity_f1(predictions, cases, labels) -> float:
    """F1 of whole entities, by kind and place (Tjong Kim Sang and De Meulder 2003); classes are
    called O, B-KIND and I-KIND. An I that continues nothing of its kind begins an entity."""
    found, true, both = 0, 0, 0
    for said, case in zip(predictions, cases, strict=True):
        mine, theirs = entities(said, labels), entities(case.label, labels)
        found, true, both = found + len(mine), true + len(theirs), both + len(mine & theirs)
    return 2 * both / (found + true) if found + true else 0.0


def entities(tags: Sequence[int], labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first word, one past the last) of each."""
    result: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for i, name in enumerate([*(labels[tag] for tag in tags), "O"]):
        side, _, own = name.partition("-")
        if kind and not (side == "I" and own == kind):
            result.add((kind, start, i))
            kind = ""
        if side in ("B", "I") and not kind:
            kind, start = own, i
    return result


METRICS: dict[str, Figure] = {
    figure.__name__: figure
    for figure in (
        accuracy,
        f1,
        macro_f1,
        matthews,
        pearson,
        spearman,
        exact_match,
        token_f1,
        group_exact_match,
        entity_f1,
    )
}


def figures(
    metrics: Sequence[str],
    predictions: Sequence[Any],
    cases: Sequence[Case],
    labels: Sequence[str] = (),
) -> dict[str, float]:
    """Name -> figure. Raises ConfigError for a name that is not among ``METRICS``."""
    if unknown := [name for name in metrics if name not in METRICS]:
        known = ", ".join(METRICS)
        raise ConfigError("metrics", f"no figure {', '.join(unknown)}; known: {known}")
    return {name: METRICS[name](predictions, cases, labels) for name in metrics}


def normal(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _overlap(said: str, right: str) -> float:
    mine, theirs = normal(said).split(), normal(right).split()
    if not mine or not theirs:
        return float(mine == theirs)
    common = (collections.Counter(mine) & collections.Counter(theirs)).total()
    return 2 * common / (len(mine) + len(theirs))


def _f1_of(said: np.ndarray, right: np.ndarray) -> float:
    total = int(said.sum() + right.sum())
    return float(2 * (said & right).sum() / total) if total else 0.0


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale else 0.0


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0; of equal numbers the mean of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[which]
