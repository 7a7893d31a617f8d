"""Which of two sentences comes first: labels that any text has (Lan et al. 2020, section 3.1)."""

from __future__ import annotations

import dataclasses
import re

from jaxpt.data.base import EmptySplit, Source, Split, unit_hash
from jaxpt.data.corpus import Corpus
from jaxpt.data.labelled import Case, Cases, LabelledSource, Record

LEAST = 20  # characters of a sentence that counts


@dataclasses.dataclass(frozen=True)
class SentenceOrder(LabelledSource):
    """Two sentences of a document, one after the other (class 1) or swapped (class 0).

    Every sentence is in one pair at most. Which pairs are swapped follows from their text.
    """

    source: Source = Corpus()  # where the texts come from

    def open(self, split: Split) -> Cases:
        records = [pair for text in self.source.open(split) for pair in pairs(text)]
        if not records:
            raise EmptySplit("source", f"split {split!r} has no two sentences in one document")
        return Cases(records, _case, ("accuracy", "f1"), ("swapped", "in_order"), "sentence_order")


def pairs(text: str) -> list[Record]:
    """Records of a document: "first", "second", "label"."""
    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", text)]
    found = []
    for first, second in zip(sentences[::2], sentences[1::2], strict=False):
        if min(len(first), len(second)) < LEAST:
            continue
        swapped = unit_hash(f"{first}\n{second}".encode()) < 0.5
        a, b = (second, first) if swapped else (first, second)
        found.append({"first": a, "second": b, "label": int(not swapped)})
    return found


def _case(record: Record) -> Case:
    return Case((record["first"], record["second"]), record["label"])
