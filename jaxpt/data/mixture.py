"""Several sources mixed by weight, by step, by size, or as the run learns."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from jaxpt.data.base import Source, Split
from jaxpt.data.mixing.base import Domain, Policy
from jaxpt.data.mixing.fixed import Fixed
from jaxpt.duration import Piecewise, at_step
from jaxpt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Mixture(Source):
    """Text of several sources, in proportion to the weights: shares of the *rows* of a batch.

    A row holds text of one source, and rows are nearly full, so weights are shares of tokens.
    Every batch has each source's share to within one row, and so have many batches together,
    to within a few (``jaxpt/data/mixing/rows.py``). Each source is shuffled and repeated by itself,
    so a small one comes round more often. One that has had its epochs drops out, and the
    others go on in their proportion; the data ends when all have ended.

    A mixture may be a part of another: its own parts share its weight, and are called
    "NAME/PART". Its weights must be plain numbers.

    The metrics tell the loss and the share of targets of each part (``domain_loss/NAME``,
    ``domain_tokens/NAME``), the weights (``mixture/NAME``) and the epochs (``epoch/NAME``).
    Validation batches are drawn with the weights that are plain numbers, and 1 for the others.
    """

    # (source, weight) pairs; weights need not add up to 1, and may go by the step of the phase
    parts: tuple[tuple[Source, float | Piecewise], ...] = ()
    names: tuple[str, ...] = ()  # of the parts, in the metrics; default: the sources' own
    # how often each part is gone through at most, None for no end; default: all without end
    epochs: tuple[int | None, ...] = ()
    policy: Policy = dataclasses.field(default_factory=Fixed)  # what makes weights of the weights

    def __post_init__(self):
        if not self.parts:
            raise ConfigError("parts", "a mixture needs at least one source")
        for i, (source, weight) in enumerate(self.parts):
            self._check_weight(i, weight)
            moving = any(isinstance(domain.weight, Piecewise) for domain in source.domains())
            if moving or type(source.mixing()) is not Fixed:
                raise ConfigError(
                    f"parts.{i}",
                    "a mixture inside a mixture has weights that are plain numbers; "
                    "write its parts into the outer one",
                )
        for field in ("names", "epochs"):
            given = len(getattr(self, field))
            if given not in (0, len(self.parts)):
                raise ConfigError(field, f"{given} are given for {len(self.parts)} parts")
        for i, epochs in enumerate(self.epochs):
            if epochs is not None and epochs < 1:
                raise ConfigError(f"epochs.{i}", f"{epochs} is not valid; give 1 or more, or None")
        for i, name in enumerate(self.names):
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ConfigError(
                    f"names.{i}", f"{name!r} is not valid; use letters, digits, _, -, + and ."
                )
            if name in self.names[:i]:
                raise ConfigError(f"names.{i}", f"two parts are called {name!r}")
        self.policy.check(self.domains())

    def _check_weight(self, i: int, weight: float | Piecewise) -> None:
        if isinstance(weight, Piecewise):
            if min(value for _, value in weight.points) < 0:
                raise ConfigError(f"parts.{i}", f"{weight} has weights below 0")
        elif not 0 < weight < math.inf:
            raise ConfigError(f"parts.{i}", f"weight {weight} is not valid; give a number > 0")

    def domains(self) -> tuple[Domain, ...]:
        found = []
        for i, (source, weight) in enumerate(self.parts):
            inner = source.domains()
            whole = sum(at_step(domain.weight, 0) for domain in inner)
            for domain in inner:
                name = self.names[i] if self.names else domain.name
                if self.names and len(inner) > 1:
                    name = f"{name}/{domain.name}"
                own = at_step(domain.weight, 0) / whole if len(inner) > 1 else 1.0
                epochs = _least(domain.epochs, self.epochs[i] if self.epochs else None)
                found.append(Domain(name, _times(weight, own), epochs))
        counts = collections.Counter(domain.name for domain in found)
        return tuple(
            dataclasses.replace(d, name=f"{d.name}{i}") if counts[d.name] > 1 else d
            for i, d in enumerate(found)
        )

    @property
    def labelled(self) -> bool:  # type: ignore[override]
        return all(source.labelled for source, _ in self.parts)

    def mixing(self) -> Policy:
        return self.policy

    def parts_of(self, split: Split) -> list[tuple[Sequence[str], float]]:
        """As every source's; the weights add up to 1, and those that go by the step count as 1."""
        weights = [
            1.0 if isinstance(domain.weight, Piecewise) else domain.weight
            for domain in self.domains()
        ]
        documents = []
        for i, (source, _) in enumerate(self.parts):
            try:
                documents += [part for part, _ in source.parts_of(split)]
            except ConfigError as error:
                raise error.within(f"parts.{i}") from error
        return [(part, w / sum(weights)) for part, w in zip(documents, weights, strict=True)]

    def open(self, split: Split) -> Sequence[str]:
        """All documents, each once, source after source."""
        return Joined(tuple(documents for documents, _ in self.parts_of(split)))


def _least(*numbers: int | None) -> int | None:
    return min((n for n in numbers if n is not None), default=None)


def _times(weight: float | Piecewise, factor: float) -> float | Piecewise:
    if isinstance(weight, Piecewise):
        return Piecewise(tuple((step, value * factor) for step, value in weight.points))
    return weight * factor


@dataclasses.dataclass(frozen=True)
class Joined(Sequence[str]):
    """Sequences one after the other."""

    pieces: tuple[Sequence[str], ...]

    def __post_init__(self):
        object.__setattr__(self, "_last", list(itertools.accumulate(map(len, self.pieces))))

    def __len__(self) -> int:
        return self._last[-1]  # type: ignore[attr-defined]

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        which = bisect.bisect_right(self._last, index)  # type: ignore[attr-defined]
        return self.pieces[which][index - (self._last[which - 1] if which else 0)]  # type: ignore[attr-defined]
