"""TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from jaxpt.data.base import EmptySplit, Source, Split, check_split
from jaxpt.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Tfds(Source):
    """A prepared dataset of ``tensorflow_datasets``, through its random-access data source.

    Needs the extra ``tfds``, and the dataset prepared as ArrayRecord files
    (``tfds build NAME --file_format=array_record``). Splits are written as tfds writes
    them: ``train``, ``train[:99%]``, ``test``.
    """

    name: str  # dataset, with config and version as far as wanted: "c4/en:3.0.1"
    train_split: str = "train"  # the dataset's split to train on
    validation_split: str = "validation"  # the dataset's split to validate on
    field: str = "text"  # feature that holds the text
    data_dir: str | None = None  # where datasets lie; None: tfds's own default

    def open(self, split: Split) -> Sequence[str]:
        """The documents of a split.

        Raises:
          ConfigError: tensorflow_datasets is not installed.
          EmptySplit: the dataset has no such split.
          DataError: the dataset is not there, or has no such feature.
        """
        check_split(split)
        name = self.train_split if split == "train" else self.validation_split
        records = records_of(self.name, name, self.data_dir, f"{split}_split")
        return Texts(records, self.field, f"{self.name}[{name}]")


def records_of(name: str, split: str, data_dir: str | None, field: str) -> Any:
    """The records of a prepared dataset, random access: ``len`` and ``[i] -> dict``.

    Args:
      name: dataset, with config and version as far as wanted.
      split: as tfds writes it.
      data_dir: where datasets lie; None: tfds's own default.
      field: what names the split, in errors.

    Raises:
      ConfigError: tensorflow_datasets is not installed.
      EmptySplit: the dataset has no such split.
      DataError: the dataset is not there.
    """
    try:
        tfds: Any = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise ConfigError(
            "name",
            f"{name!r} needs tensorflow_datasets: pip install 'jaxpt[tfds]' ({error})",
        ) from error
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        base = split.split("[")[0]
        if base not in builder.info.splits:
            known = ", ".join(builder.info.splits) or "none: it is not prepared"
            raise EmptySplit(field, f"{name} has no split {base!r}; it has {known}")
        return builder.as_data_source(split=split)
    except (OSError, ValueError, NotImplementedError, AttributeError, LookupError) as error:
        if isinstance(error, ConfigError):
            raise
        first = str(error).splitlines()[:1]  # tfds goes on to list all that it knows
        raise DataError(f"{name}: {''.join(first)}") from error


@dataclasses.dataclass(frozen=True)
class Texts(Sequence[str]):
    """One feature of records."""

    records: Any
    field: str
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        record = self.records[index]
        if self.field not in record:
            known = ", ".join(sorted(record))
            raise DataError(
                f"{self.name}, record {index}: no feature {self.field!r}; it has {known}"
            )
        text = record[self.field]
        if isinstance(text, str):
            return text
        try:
            return bytes(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name}, record {index}: not UTF-8: {error.reason}") from error
