"""Hugging Face ``datasets``: of the hub, of local files, or saved to disk."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpt.data.base import EmptySplit, Source, Split, check_split
from jaxpt.data.jsonl import usable
from jaxpt.data.skips import BLANK, Bad, Errors, Skips, check_errors
from jaxpt.errors import ConfigError, DataError

BATCH = 1024  # rows read at a time when a split is looked through


@dataclasses.dataclass(frozen=True)
class HuggingFace(Source):
    """A dataset of the ``datasets`` library; a document is a row's text. Needs the extra ``hf``.

    The library keeps a dataset as Arrow files in its cache, which are read at random. Splits are
    written as it writes them: ``train``, ``train[:99%]``, ``test``. Rows are not looked at when
    opening unless ``errors`` is skip: one that has no string is then an error on access, and a
    blank one a document without tokens.
    """

    name: str  # dataset on the hub, folder of data files, or folder that save_to_disk wrote
    config: str | None = None  # the dataset's configuration, where it has several
    train_split: str = "train"  # the dataset's split to train on
    validation_split: str = "validation"  # the dataset's split to validate on
    field: str = "text"  # column of the text
    # rows that are blank or no string: raise (on access), or look at all rows and skip those
    errors: Errors = "raise"

    def __post_init__(self):
        check_errors(self.errors)

    def open(self, split: Split) -> Rows:
        """The documents of a split.

        Raises:
          ConfigError: ``datasets`` is not installed.
          EmptySplit: the dataset has no such split, or nothing in it.
          DataError: the dataset cannot be had, or has no such column.
        """
        check_split(split)
        wanted = self.train_split if split == "train" else self.validation_split
        found = dataset_of(self.name, self.config, wanted, f"{split}_split")
        name = f"{self.name}[{wanted}]"
        if self.field not in found.column_names:
            known = ", ".join(found.column_names)
            raise DataError(f"{name}: no column {self.field!r}; its columns: {known}")
        rows, skips = None, Skips()
        if self.errors == "skip":
            rows = _usable_rows(found, self.field, name, skips)
            skips.log(name)
        if not (len(found) if rows is None else len(rows)):
            raise EmptySplit(f"{split}_split", f"{name} has no document; left out: {skips.counts}")
        return Rows(found.select_columns([self.field]), self.field, name, rows, skips)


def dataset_of(name: str, config: str | None, split: str, field: str) -> Any:
    """A split as a ``datasets.Dataset``: ``len`` and ``[i] -> dict``.

    Args:
      name: dataset on the hub, folder of data files, or folder that save_to_disk wrote.
      config: the dataset's configuration, where it has several.
      split: as the library writes it.
      field: what names the split, in errors.

    Raises:
      ConfigError: ``datasets`` is not installed.
      EmptySplit: the dataset has no such split.
      DataError: the dataset cannot be had.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            "name", f"{name!r} needs datasets: pip install 'jaxpt[hf]' ({error})"
        ) from error
    try:
        return _load(datasets, name, config, split)
    except KeyError as error:
        known = ", ".join(error.args[1])
        raise EmptySplit(field, f"{name} has no split {split!r}; it has {known}") from None
    except Exception as error:  # the library has many of its own, and passes on others'
        first = str(error).split("\n")[0]
        raise DataError(f"{name}: {type(error).__name__}: {first}") from error


def _load(datasets: Any, name: str, config: str | None, split: str) -> Any:
    """A split as a ``datasets.Dataset``. Raises KeyError(split, those there are)."""
    folder = Path(name).expanduser()
    saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if not saved:
        try:
            return datasets.load_dataset(name, config, split=split)
        except ValueError as error:
            if "Unknown split" not in str(error):
                raise
            known = datasets.get_dataset_split_names(name, config)
            raise KeyError(split, known) from None
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    base = split.split("[")[0]
    if base not in found:
        raise KeyError(base, list(found))
    sizes = {part: len(rows) for part, rows in found.items()}
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    return found[base].select(range(part.from_ or 0, sizes[base] if part.to is None else part.to))


def _usable_rows(found: Any, field: str, name: str, skips: Skips) -> np.ndarray:
    """int64: the rows whose text can be used; the others go to ``skips``."""
    rows, row = [], 0
    for batch in found.select_columns([field]).with_format("arrow").iter(BATCH):
        for text in batch.column(0).to_pylist():
            try:
                usable(text, f"column {field!r}")
                rows.append(row)
            except Bad as bad:
                skips.add(bad.reason, f"{name}, row {row}")
            row += 1
    return np.array(rows, np.int64)


@dataclasses.dataclass(frozen=True)
class Rows(Sequence[str]):
    """One column of a dataset, or of some rows of it."""

    dataset: Any
    field: str
    name: str
    rows: np.ndarray | None  # int64 [documents]; None: all
    skips: Skips  # what was left out

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows were left out, by reason."""
        return self.skips.counts

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        row = index if self.rows is None else int(self.rows[index])
        text = self.dataset[row][self.field]
        try:
            return usable(text, f"column {self.field!r}")
        except Bad as bad:
            if bad.reason == BLANK:
                return text
            raise bad.at(f"{self.name}, row {row}") from None
