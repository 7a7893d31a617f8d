"""The table that a family is: which of its tensors are which of ours, read in both directions.

Our paths are those of unrolled layers (``decoder/layers_3/attention/query/w``), whatever the model
does, and of dense matrices, however they are held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

Arrays = Sequence[np.ndarray]
Shapes = Sequence[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Some tensors of theirs that stand for some of ours; each name is in one entry of a table.

    Vocabulary axes have no padding here. Both functions must be exact inverses, and should give
    views: shapes are checked by calling them, before anything is read.

    theirs, ours: names.
    load: (their arrays, the shapes that ours should have) -> our arrays.
    save: (our arrays) -> their arrays.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    load: Callable[[Arrays, Shapes], Arrays]
    save: Callable[[Arrays], Arrays]

    def within(self, theirs: str, ours: str) -> Entry:
        """The entry with these in front of its names, and a slash after ``ours``."""
        return dataclasses.replace(
            self,
            theirs=tuple(theirs + name for name in self.theirs),
            ours=tuple(f"{ours}/{name}" for name in self.ours),
        )


def same(theirs: str, ours: str) -> Entry:
    """A tensor as it is: norms, biases, embeddings."""
    return Entry((theirs,), (ours,), lambda arrays, _: arrays, lambda arrays: arrays)


def transposed(theirs: str, ours: str) -> Entry:
    """A tensor of two axes whose axes are the other way round."""

    def swap(arrays: Arrays) -> Arrays:
        return [a.T for a in arrays]

    return Entry((theirs,), (ours,), lambda arrays, _: swap(arrays), swap)


def linear(theirs: str, ours: str, *, bias: bool = False) -> list[Entry]:
    """torch's ``Linear``, [out, in] and perhaps a bias, as our projection [in, out]."""
    entries = [transposed(f"{theirs}.weight", f"{ours}/w")]
    return [*entries, same(f"{theirs}.bias", f"{ours}_bias")] if bias else entries


def norm(theirs: str, ours: str, *, bias: bool = False) -> list[Entry]:
    """A norm's scale and perhaps its bias."""
    entries = [same(f"{theirs}.weight", f"{ours}/scale")]
    return [*entries, same(f"{theirs}.bias", f"{ours}/bias")] if bias else entries


def joined(theirs: str, ours: Sequence[str], *, turned: bool = True) -> Entry:
    """Several of ours along their last axis, one after another, as one tensor of theirs: fused
    queries, keys and values, or gate and up. ``turned``: theirs is the transpose (torch's Linear).
    """

    def load(arrays: Arrays, shapes: Shapes) -> Arrays:
        (whole,) = arrays
        whole = whole.T if turned else whole
        ends = np.cumsum([shape[-1] for shape in shapes])
        if whole.shape[-1] != ends[-1]:
            return [whole] * len(shapes)  # of wrong shapes, which the caller will say
        return np.split(whole, ends[:-1], axis=-1)

    def save(arrays: Arrays) -> Arrays:
        whole = np.concatenate(arrays, axis=-1)
        return [whole.T if turned else whole]

    return Entry((theirs,), tuple(ours), load, save)


def layers(
    count: int, theirs: str, ours: str, entries: Callable[[int], Iterable[Entry]]
) -> Iterator[Entry]:
    """The entries of ``count`` layers: ``theirs`` has ``{}`` for the layer's number, and ``ours``
    is what the paths have before ``layers_0``."""
    for i in range(count):
        for entry in entries(i):
            yield entry.within(theirs.format(i), f"{ours}/layers_{i}")
