"""Which package of Python's standard library a stretch of text is from: labels on every machine."""

from __future__ import annotations

import dataclasses
import re

from jaxpt.data.base import EmptySplit, Split
from jaxpt.data.corpus import Corpus
from jaxpt.data.labelled import Case, Cases, LabelledSource, Record
from jaxpt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Packages(LabelledSource):
    """Stretches of whole lines of the ``Corpus``; the class is the package (a folder of it).

    No file is in both splits. The packages' names are written "_" in what is read: the answer is
    to be told from what the text is about. Spaces at the beginning of lines are left out.
    """

    packages: tuple[str, ...] = (
        "asyncio",
        "email",
        "importlib",
        "multiprocessing",
        "unittest",
        "xml",
    )  # folders of the standard library, in the classes' order; two or more
    characters: int = 400  # of a stretch, at least; what is left at a file's end is none
    corpus: Corpus = Corpus(holdout=0.2)  # where the texts come from, and which are validation

    def __post_init__(self):
        if len(set(self.packages)) != len(self.packages) or len(self.packages) < 2:
            raise ConfigError("packages", f"{self.packages} is not valid; give two or more")
        if self.characters < 1:
            raise ConfigError("characters", f"{self.characters} is not valid; give 1 or more")

    def open(self, split: Split) -> Cases:
        files = self.corpus.open(split)
        records: list[Record] = []
        for name, text in zip(files.names, files, strict=True):
            package, _, inner = name.partition("/")
            if inner and package in self.packages:
                label = self.packages.index(package)
                parts = stretches(text, self.characters, self.packages)
                records += [{"text": part, "label": label} for part in parts]
        if not records:
            raise EmptySplit("packages", f"split {split!r} has no text of {self.packages}")
        return Cases(records, _case, ("accuracy", "macro_f1"), self.packages, "packages")


def stretches(text: str, characters: int, names: tuple[str, ...]) -> list[str]:
    """The text cut at ends of lines into parts of ``characters`` or more, without the names."""
    hidden = re.sub("|".join(map(re.escape, names)), "_", text, flags=re.IGNORECASE)
    found, part = [], ""
    for line in hidden.splitlines():
        part += line.strip() + "\n" if line.strip() else ""
        if len(part) >= characters:
            found.append(part)
            part = ""
    return found


def _case(record: Record) -> Case:
    return Case((record["text"],), record["label"])
