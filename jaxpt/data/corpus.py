"""The embedded default corpus: the source text of Python's own standard library."""

from __future__ import annotations

import dataclasses
import functools
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from jaxpt.data.base import Source, Split, check_split, unit_hash
from jaxpt.data.skips import BLANK, NOT_UTF8, Skips
from jaxpt.errors import ConfigError, DataError

# Folders that are no part of the library proper: what was installed into it, its test suites
# (much of which is test data in odd encodings), and caches.
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Corpus(Source):
    """The ``.py`` files of the standard library, docstrings and source; a file is a document.

    About 10 MB of text that is on every machine that can run this code. Files are found
    through ``sysconfig`` and sorted; those that are blank or not UTF-8 are left out and counted
    (``skipped``, with the training split). The split goes by a hash of the file's path relative
    to the library, so it is the same everywhere. Files are read when they are asked for.
    """

    holdout: float = 0.05  # share of the files that are validation

    def __post_init__(self):
        if not 0 < self.holdout < 1:
            raise ConfigError(
                "holdout", f"{self.holdout} is not a share; give a number between 0 and 1"
            )

    def open(self, split: Split) -> Files:
        """The documents of a split. Raises DataError where the installation has no source."""
        check_split(split)
        root = sysconfig.get_path("stdlib")
        found, skips = library(root)
        names = tuple(
            name
            for name in found
            if (unit_hash(name.encode()) < self.holdout) == (split == "validation")
        )
        if not names:
            raise DataError(f"{root}: no .py files of the standard library in split {split!r}")
        return Files(root, names, skips if split == "train" else Skips())


@dataclasses.dataclass(frozen=True)
class Files(Sequence[str]):
    """UTF-8 files below ``root``, read on access."""

    root: str
    names: tuple[str, ...]
    skips: Skips = dataclasses.field(default_factory=Skips)  # what was left out

    @property
    def skipped(self) -> dict[str, int]:
        """How many files were left out, by reason."""
        return self.skips.counts

    def __len__(self) -> int:
        return len(self.names)

    def sizes(self) -> list[int]:
        """Bytes of each file."""
        return [Path(self.root, name).stat().st_size for name in self.names]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Files(self.root, self.names[index])
        path = Path(self.root, self.names[index])
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {error}") from error


@functools.cache
def library(root: str) -> tuple[tuple[str, ...], Skips]:
    """Sorted relative paths (with /) of the standard library's UTF-8 ``.py`` files that are not
    blank, and what was left out."""
    names, skips = [], Skips()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for file in sorted(name for name in files if name.endswith(".py")):
            path = Path(folder, file)
            reason = _unusable(path)
            if reason:
                skips.add(reason, path.relative_to(root).as_posix())
            else:
                names.append(path.relative_to(root).as_posix())
    return tuple(sorted(names)), skips


def _unusable(path: Path) -> str | None:
    """Why a file is no document; None where it is one."""
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return NOT_UTF8
    return None if data.strip() else BLANK
