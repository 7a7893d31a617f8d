"""Labelled examples: what a source of them gives, and where their records come from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpt.data import hf, tfds
from jaxpt.data.base import EmptySplit, Source, Split, check_split
from jaxpt.errors import ConfigError, DataError

Record = Mapping[str, Any]  # feature -> text, number, or lists and mappings of these


@dataclasses.dataclass(frozen=True)
class Case:
    """One labelled example; its form says which fields it has.

    texts: what is read, one or two; of words that are tagged, the words.
    label: the class's number, or a score (float); a tuple of classes, one a word; (first character,
      one past the last) of an answer in the last text, both 0 where it has none.
    target: what is to be written, where answers are text.
    answers: texts that count as right.
    group: of cases that are judged together; None: each by itself.
    """

    texts: tuple[str, ...]
    label: Any = None
    target: str = ""
    answers: tuple[str, ...] = ()
    group: Any = None


@dataclasses.dataclass(frozen=True)
class Cases(Sequence[Case]):
    """Random access to cases, made of records on access; picklable.

    metrics: names of the figures that they are judged by (``jaxpt.objectives.figures``).
    labels: words of the classes, in order; () where there are none.
    """

    records: Sequence[Record]
    read: Callable[[Record], Case]
    metrics: tuple[str, ...]
    labels: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        record = plain(self.records[index])
        try:
            case = self.read(record)
            for text in (*case.texts, case.target, *case.answers):
                text.encode("utf-8")  # half of a surrogate pair cannot be, nor what is no text
            return case
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            known = ", ".join(sorted(record)) if isinstance(record, dict) else "none"
            raise DataError(
                f"{self.name}, record {index}: {type(error).__name__}: {error}; features: {known}"
            ) from error

    def sizes(self) -> np.ndarray:
        """int64 [cases]: 1 each. A case is never cut into pieces."""
        return np.ones(len(self), np.int64)


@dataclasses.dataclass(frozen=True)
class LabelledSource(Source):
    """A source whose documents are ``Case``: for objectives that learn from labels."""

    labelled = True

    def open(self, split: Split) -> Cases:
        """The cases of a split. Raises as ``Source.open``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Names:
    """What a dataset is called where it can be had from, and its validation split there."""

    tfds: str
    hub: tuple[str, ...]  # of the Hugging Face hub: name, and the configuration where it has some
    validation: str = "validation"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where records come from; the subclasses are here."""

    def records(self, names: Names, split: Split) -> Sequence[Record]:
        """The records of a split, read on access.

        Raises:
          ConfigError: a library that is not installed, or no such split.
          DataError: what cannot be read.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FromTfds(Origin):
    """TensorFlow Datasets, read without TensorFlow. Needs the extra ``tfds``, and the dataset
    prepared as ArrayRecord files (``tfds build NAME --file_format=array_record``)."""

    data_dir: str | None = None  # where datasets lie; None: tfds's own default

    def records(self, names: Names, split: Split) -> Sequence[Record]:
        wanted = "train" if split == "train" else names.validation
        return tfds.records_of(names.tfds, wanted, self.data_dir, "origin")


@dataclasses.dataclass(frozen=True)
class FromHub(Origin):
    """The ``datasets`` library of Hugging Face. Needs the extra ``hf``."""

    # dataset on the hub, or a folder of data files, or that save_to_disk wrote; None: the hub's own
    path: str | None = None

    def records(self, names: Names, split: Split) -> Sequence[Record]:
        wanted = "train" if split == "train" else names.validation
        name, *config = names.hub if self.path is None else (self.path,)
        return hf.dataset_of(name, config[0] if config else None, wanted, "origin")


@dataclasses.dataclass(frozen=True)
class FromFiles(Origin):
    """Files of JSON objects, one a line, with the features that the dataset has elsewhere."""

    train: str  # file to train on
    validation: str | None = None  # file to validate on; None: there is none

    def records(self, names: Names, split: Split) -> Sequence[Record]:
        name = self.train if split == "train" else self.validation
        if name is None:
            raise EmptySplit("origin.validation", "no file is named to validate on")
        try:
            # By newlines alone: a text may have other separators of lines, written as they are.
            lines = Path(name).expanduser().read_text(encoding="utf-8").split("\n")
            return [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{name}: {error}") from error


def plain(value: Any) -> Any:
    """A record in Python's own types: bytes as text, arrays as lists, their numbers as numbers."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def opened(
    origin: Origin,
    names: Names,
    split: Split,
    read: Callable[[Record], Case],
    metrics: tuple[str, ...],
    labels: tuple[str, ...] = (),
) -> Cases:
    """The cases of a split. Raises as ``Source.open``."""
    check_split(split)
    try:
        records = origin.records(names, split)
    except ConfigError as error:
        raise error.within("origin") if error.field == "name" else error from None
    return Cases(records, read, metrics, labels, f"{names.tfds}[{split}]")
