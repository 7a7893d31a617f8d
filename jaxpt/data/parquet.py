"""Parquet files."""

from __future__ import annotations

import collections
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxpt.data.base import Source, Split
from jaxpt.data.files import Globs
from jaxpt.data.jsonl import usable
from jaxpt.data.records import Records, check_fields, open_records_of
from jaxpt.data.skips import BROKEN, NOT_UTF8, Bad, Errors
from jaxpt.errors import ConfigError

GROUPS = 4  # row groups of a file that are kept in memory
BATCH = 1024  # rows read at a time when a file is looked through


@dataclasses.dataclass(frozen=True)
class Parquet(Source):
    """Parquet files; a document is a row's text. Needs the extra ``parquet`` (pyarrow).

    Files are looked through once when they are opened. On access a whole row group is read, and
    the last few are kept: documents in an order of their own cost much reading where row groups
    are large. ``jaxpt data build`` reads them once, in order.
    """

    train: Globs = ()  # files to train on: a path or glob, or several (** goes into folders)
    validation: Globs | None = None  # files to validate on; None: a share of the rows of train
    column: str = "text"  # the column of the text
    holdout: float = 0.01  # share of the rows that is validation where no files are named for it
    check: bool = True  # look at every row when opening, so that a bad one is found before training
    # a row without text, a file that is broken or lacks the column: raise an error, or skip it
    errors: Errors = "raise"

    def __post_init__(self):
        check_fields(self.holdout, self.errors, self.check, self.validation)

    def open(self, split: Split) -> Records:
        """The documents of a split.

        Raises:
          ConfigError: a glob that matches nothing, a split without documents, no pyarrow.
          DataError: a file that cannot be read; where ``errors`` is raise, also one without the
            column, and a row without text (on access, if ``check`` is off).
        """
        arrow("train")
        return open_records_of(
            self.train,
            self.validation,
            self.holdout,
            split,
            Column(self.column),
            self.errors,
            self.check,
        )


def arrow(field: str) -> Any:
    """pyarrow, with pyarrow.parquet. Raises ConfigError where it is not installed."""
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ConfigError(
            field, f"Parquet needs pyarrow: pip install 'jaxpt[parquet]' ({error})"
        ) from error


class _Opened:
    """An open file, its row groups' ends, and those last read."""

    def __init__(self, file: Any):
        self.file = file
        metadata = file.metadata
        groups = range(metadata.num_row_groups)
        rows = [metadata.row_group(i).num_rows for i in groups]
        if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
            raise Bad(BROKEN, f"its parts have {rows} rows, and it says {metadata.num_rows}")
        self.ends = np.cumsum(rows, dtype=np.int64)
        self.kept: collections.OrderedDict[int, Any] = collections.OrderedDict()


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of Parquet files: a ``Format``."""

    name: str
    record = "row"

    def open(self, path: str) -> _Opened:
        pa = arrow("train")
        try:
            file = pa.parquet.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise Bad(BROKEN, f"no Parquet file, or cut off: {_first(error)}") from error
        schema = file.schema_arrow
        if self.name not in schema.names:
            known = ", ".join(schema.names) or "none"
            raise Bad(f"no column {self.name!r}", f"no column {self.name!r}; its columns: {known}")
        kind = schema.field(self.name).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
        if not any(getattr(pa.types, f"is_{test}")(value) for test in tests):
            raise Bad("not a string", f"column {self.name!r} is {kind}, not text")
        return _Opened(file)

    def count(self, handle: _Opened) -> int:
        return handle.file.metadata.num_rows

    def texts(self, handle: _Opened) -> Iterator[str | Bad]:
        pa = arrow("train")
        try:
            for batch in handle.file.iter_batches(BATCH, columns=[self.name]):
                for value in _bytes(batch.column(0)).to_pylist():
                    try:
                        yield self._text(value)
                    except Bad as bad:
                        yield bad
        except (pa.ArrowException, OSError) as error:
            raise Bad(BROKEN, f"cannot be read: {_first(error)}") from error

    def text(self, handle: _Opened, row: int) -> str:
        group = int(np.searchsorted(handle.ends, row, side="right"))
        if group not in handle.kept:
            pa = arrow("train")
            try:
                table = handle.file.read_row_group(group, columns=[self.name])
                column = _bytes(table.column(0).combine_chunks())
            except (pa.ArrowException, OSError, IndexError) as error:
                raise Bad(BROKEN, f"cannot be read: {_first(error)}") from error
            handle.kept[group] = column
            while len(handle.kept) > GROUPS:
                handle.kept.popitem(last=False)
        handle.kept.move_to_end(group)
        first = int(handle.ends[group - 1]) if group else 0
        if not 0 <= row - first < len(handle.kept[group]):
            raise Bad(BROKEN, "cannot be read: it has fewer rows than it says")
        return self._text(handle.kept[group][row - first].as_py())

    def _text(self, value: bytes | None) -> str:
        if value is None:
            raise Bad("null", f"column {self.name!r} is null")
        try:
            return usable(value.decode("utf-8"), f"column {self.name!r}")
        except UnicodeDecodeError as error:
            raise Bad(NOT_UTF8, f"not UTF-8: {error.reason}") from None


def _bytes(array: Any) -> Any:
    """A column as bytes, so that what is not UTF-8 can be told apart."""
    pa = arrow("train")
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.large_binary())


def _first(error: Exception) -> str:
    return str(error).split("\n")[0]
