"""What a source of documents is."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import PurePath
from typing import Literal

import numpy as np

from jaxpt.data.mixing.base import Domain, Policy
from jaxpt.data.mixing.fixed import Fixed
from jaxpt.errors import ConfigError

Split = Literal["train", "validation"]
SPLITS = ("train", "validation")


class EmptySplit(ConfigError):
    """A source has nothing in a split that was asked for."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Config of a source; subclasses live in a file each in ``jaxpt/data``."""

    # Whether its documents are ``Case`` (jaxpt/data/labelled.py), and not texts.
    labelled = False

    def open(self, split: Split) -> Sequence[str]:
        """Random access to the documents of a split: ``len`` and ``[i] -> str``; picklable.

        Raises:
          DataError: what cannot be read, naming the file (and line).
          ConfigError: the source has no such split.
        """
        raise NotImplementedError

    def parts_of(self, split: Split) -> list[tuple[Sequence[str], float]]:
        """(documents, weight) of each part that the loader mixes; a plain source is one part.

        Each part is shuffled and repeated by itself. Weights need not add up to 1. The parts are
        those of ``domains``, in the same order.
        """
        return [(self.open(split), 1.0)]

    def domains(self) -> tuple[Domain, ...]:
        """Names, weights and epochs of the parts, without reading anything.

        A plain source is called like the dataset or the file that it names, else like its class.
        """
        return (Domain(_name(self)),)

    def mixing(self) -> Policy:
        """How the parts share the rows of a batch."""
        return Fixed()


def _name(source: Source) -> str:
    own = type(source).__name__.lower()
    for field in ("name", "train", "path", "folder"):
        value = getattr(source, field, None)
        if isinstance(value, str) and (stem := PurePath(value).name.split(".")[0]):
            return stem if stem.replace("-", "").replace("_", "").isalnum() else own
    return own


def document_sizes(documents: Sequence[str]) -> np.ndarray:
    """int64: bytes of each document where they have ``sizes()``; else the lengths of their texts,
    which are all read."""
    sizes = getattr(documents, "sizes", None)
    return np.array(list(map(len, documents)) if sizes is None else sizes(), np.int64)


def check_split(split: str) -> None:
    """Raises ConfigError unless ``split`` is one of ``SPLITS``."""
    if split not in SPLITS:
        raise ConfigError("split", f"{split!r} is not one of {', '.join(SPLITS)}")


def unit_hash(data: bytes) -> float:
    """A number in [0, 1) that depends on ``data`` alone: the same on every machine, for ever.

    What lies below a source's ``holdout`` share is validation, so that equal documents never
    stand on both sides.
    """
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2.0**64
