"""Documents in files of records (Parquet, ArrayRecord): looked through once, read on access."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxpt.data.base import Split, check_split, unit_hash
from jaxpt.data.files import Globs, check_holdout, find, no_documents, stamp
from jaxpt.data.skips import Bad, Errors, Skips, check_errors, merged
from jaxpt.errors import ConfigError, DataError


class Format(Protocol):
    """How files of a kind are read. A frozen dataclass: it is hashed and pickled."""

    record: str  # what a record is called: "row"

    def open(self, path: str) -> Any:
        """A handle. Raises Bad where the whole file cannot be used."""
        ...

    def count(self, handle: Any) -> int:
        """Records of the file."""
        ...

    def texts(self, handle: Any) -> Iterator[str | Bad]:
        """The text of every record in order, or why it has none."""
        ...

    def text(self, handle: Any, row: int) -> str:
        """The text of a record. Raises Bad."""
        ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """The records of a file that are documents."""

    path: str
    stamp: tuple[int, int]  # the file's size and time
    rows: np.ndarray | range  # numbers of the records, int64 [documents]
    sizes: np.ndarray | None  # int64 [documents], bytes of UTF-8; None: not looked at
    shares: np.ndarray | None  # float64 [documents], hashes of the texts; None: not looked at
    skips: Skips


class Records(Sequence[str]):
    """Documents of several files of records."""

    def __init__(self, files: Sequence[Rows], format: Format):
        self.files, self.format = tuple(files), format
        self.last = np.cumsum([len(file.rows) for file in self.files])
        self._handles: dict[int, Any] = {}

    def __reduce__(self):
        return Records, (self.files, self.format)

    def __len__(self) -> int:
        return int(self.last[-1]) if len(self.last) else 0

    def sizes(self) -> np.ndarray:
        """Bytes of each document's text, int64. Reads all of them, where that was not done yet."""
        sizes = [
            _rows(file.path, file.stamp, self.format, "raise").sizes
            if file.sizes is None
            else file.sizes
            for file in self.files
        ]
        return np.concatenate(sizes)  # type: ignore[arg-type]

    @property
    def skips(self) -> Skips:
        """What was left out, with the places of the first."""
        return merged(file.skips for file in self.files)

    @property
    def skipped(self) -> dict[str, int]:
        """How many documents were left out, by reason; see ``Documents.skipped``."""
        return self.skips.counts

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        which = int(np.searchsorted(self.last, index, side="right"))
        file = self.files[which]
        row = int(file.rows[index - (int(self.last[which - 1]) if which else 0)])
        try:
            if which not in self._handles:
                if stamp(file.path) != file.stamp:
                    raise DataError(f"{file.path} has changed since it was opened")
                self._handles[which] = self.format.open(file.path)
            return self.format.text(self._handles[which], row)
        except Bad as bad:
            raise bad.at(f"{file.path}, {self.format.record} {row}") from None


def open_records_of(
    globs: Globs,
    validation: Globs | None,
    holdout: float,
    split: Split,
    format: Format,
    errors: Errors,
    check: bool,
) -> Records:
    """The documents of a split of the files that globs match; as ``files.open_documents``.

    Raises:
      ConfigError: a glob that matches nothing.
      EmptySplit: a split without documents.
      DataError: a file that cannot be read; where ``errors`` is raise and ``check`` is on, also
        the first record that cannot be used, with its number from 0.
    """
    check_split(split)
    held = validation is None
    name = "train" if held or split == "train" else "validation"
    paths = find(globs if held or split == "train" else validation, name)
    read = _rows if check else _unread
    files = [read(path, stamp(path), format, errors) for path in paths]
    if held:
        files = [_part(file, holdout, split) for file in files]
    documents = Records(files, format)
    if not len(documents):
        raise no_documents(name, paths, split, held, documents.skipped)
    return documents


def check_fields(holdout: float, errors: Errors, check: bool, validation: Globs | None) -> None:
    """Raises ConfigError where the fields of a source of records contradict one another."""
    check_holdout(holdout)
    check_errors(errors)
    if not check and (errors == "skip" or validation is None):
        why = "errors = skip" if errors == "skip" else "holding out a share for validation"
        raise ConfigError("check", f"{why} needs it: every record is looked at when opening")


def _unread(path: str, stamp: tuple[int, int], format: Format, errors: Errors) -> Rows:
    try:
        count = format.count(format.open(path))
    except Bad as bad:
        raise bad.at(path) from None
    # A range: a file may say that it has more records than there is memory for their numbers.
    return Rows(path, stamp, range(max(0, count)), None, None, Skips())


@functools.lru_cache(maxsize=4096)
def _rows(path: str, stamp: tuple[int, int], format: Format, errors: Errors) -> Rows:
    """The documents of a file; remembered as long as its size and time stay the same."""
    rows, sizes, shares, skips = [], [], [], Skips()
    try:
        for row, text in enumerate(format.texts(format.open(path))):
            if isinstance(text, Bad):
                skips.reject(text, f"{path}, {format.record} {row}", errors)
                continue
            data = text.encode("utf-8")
            rows.append(row)
            sizes.append(len(data))
            shares.append(unit_hash(data))
    except Bad as bad:  # the whole file; what was read of it before it broke off is left out too
        rows, sizes, shares = [], [], []
        skips.reject(bad, path, errors)
    skips.log(path)
    numbers = np.array(rows, np.int64), np.array(sizes, np.int64), np.array(shares, np.float64)
    return Rows(path, stamp, *numbers, skips)


def _part(file: Rows, holdout: float, split: Split) -> Rows:
    """The file's documents that belong to a split."""
    assert file.shares is not None
    assert isinstance(file.rows, np.ndarray)
    assert file.sizes is not None
    mine = (file.shares < holdout) == (split == "validation")
    return dataclasses.replace(
        file,
        rows=file.rows[mine],
        sizes=file.sizes[mine],
        shares=None,
        skips=file.skips if split == "train" else Skips(),
    )
