"""Tokenised documents on disk, as ``jaxpt data build`` writes them, and the source that reads them.

A build is a folder::

    manifest.json                        what it is made of, and a checksum of each file
    tokenizer/                           the tokenizer that made it (``load_tokenizer``)
    SPLIT-IIIII-of-NNNNN.arrayrecord     a record a document: its ids, little-endian
    SPLIT-IIIII-of-NNNNN.sizes.npy       int64 [documents]: its size as its source counts it

Ids are uint16 where the vocabulary has at most 2^16, else uint32. Nothing is added to a
document: no end, no padding. Documents are in the order of their source. Sizes are kept because
the loader cuts few, long documents by them: so a build and its source give the same batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpt.data.base import EmptySplit, Source, Split, check_split
from jaxpt.errors import ConfigError, DataError
from jaxpt.files import read_json

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
READER = "readahead_buffer_size:0,max_parallelism:0"  # for access at random
READER_BUFFER = 1 << 15  # bytes


@dataclasses.dataclass(frozen=True)
class Built(Source):
    """A folder that ``jaxpt data build`` wrote.

    The run's tokenizer must be the one that it was built with: the loader holds their
    fingerprints against one another.
    """

    folder: str  # the folder, with its manifest.json

    def open(self, split: Split) -> BuiltDocuments:
        """The token ids of a split's documents, each int32 [tokens].

        Raises:
          EmptySplit: the build has no such split.
          DataError: it is no finished build, or files are missing or cut off.
        """
        check_split(split)
        folder = Path(self.folder).expanduser()
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            known = ", ".join(manifest["splits"])
            raise EmptySplit("folder", f"{self.folder} has no split {split!r}; it has {known}")
        shards = manifest["splits"][split]["shards"]
        for shard in shards:
            for file in shard["files"]:
                _check_size(folder / file["name"], file["size"])
        return BuiltDocuments(
            folder=str(folder),
            names=tuple(shard["files"][0]["name"] for shard in shards),
            counts=tuple(shard["documents"] for shard in shards),
            dtype=manifest["dtype"],
            tokenizer=manifest["tokenizer"],
            skipped={
                reason: found["count"]
                for reason, found in manifest["splits"][split]["skipped"].items()
            },
        )


class BuiltDocuments(Sequence[np.ndarray]):
    """Token ids of documents, int32 [tokens] each, read on access. Picklable.

    Attributes:
      skipped: how many documents the build left out, by reason.
    """

    def __init__(
        self,
        folder: str,
        names: tuple[str, ...],
        counts: tuple[int, ...],
        dtype: str,
        tokenizer: dict[str, Any],
        skipped: dict[str, int],
    ):
        self._fields = (folder, names, counts, dtype, tokenizer, skipped)
        self.folder, self.names, self.counts = Path(folder), names, counts
        self.dtype, self.tokenizer, self.skipped = DTYPES[dtype], tokenizer, skipped
        self._ends = np.cumsum(counts)
        self._readers: dict[int, Any] = {}

    def __reduce__(self):
        return BuiltDocuments, self._fields

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sizes(self) -> np.ndarray:
        """int64 [documents]: their sizes as the source that was built from counts them."""
        pairs = zip(self.names, self.counts, strict=True)
        return np.concatenate([_sizes(self.folder / sizes_name(name), n) for name, n in pairs])

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises ConfigError unless the ids are those of ``tokenizer``."""
        if tokenizer.fingerprint != self.tokenizer["fingerprint"]:
            raise ConfigError(
                "tokenizer",
                f"the run's has fingerprint {tokenizer.fingerprint} "
                f"({tokenizer.base.kind}, {tokenizer.vocabulary.size} ids), and {self.folder} was "
                f"built with {self.tokenizer['fingerprint']} ({self.tokenizer['kind']}, "
                f"{self.tokenizer['size']} ids); build it again, or use the tokenizer that is "
                f"in {self.folder / TOKENIZER}",
            )

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        which = int(np.searchsorted(self._ends, index, side="right"))
        reader = self._readers.get(which)
        if reader is None:
            reader = self._readers[which] = open_records(self.folder / self.names[which])
        place = index - (int(self._ends[which - 1]) if which else 0)
        try:
            (record,) = reader.read([place])
        except (RuntimeError, ValueError, IndexError) as error:
            name = self.folder / self.names[which]
            raise DataError(f"{name}, record {place}: cannot be read: {error}") from error
        if len(record) % self.dtype.itemsize:
            name = self.folder / self.names[which]
            raise DataError(f"{name}, record {place}: {len(record)} bytes are no ids")
        return np.frombuffer(record, self.dtype).astype(np.int32)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished build.

    Raises:
      DataError: there is none, it is of another format, or the build is not finished.
    """
    path = Path(folder).expanduser() / MANIFEST
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
    if manifest is None:
        begun = (path.parent / "build").is_dir()
        why = "its build is not finished: run the same command again" if begun else "no build"
        raise DataError(f"{path}: no such file; {why}")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a build of format {FORMAT}")
    try:
        _check_manifest(manifest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not the manifest that a build writes: {error!r}") from None
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises an error of Python's where something is missing or of another kind than a build has
    it, or names a file outside of its folder."""
    if not isinstance(manifest["dtype"], str) or manifest["dtype"] not in DTYPES:
        raise ValueError(f"dtype {manifest['dtype']!r}")
    for name, kind in (("fingerprint", str), ("kind", str), ("size", int)):
        if not isinstance(manifest["tokenizer"][name], kind):
            raise TypeError(f"tokenizer's {name} is {manifest['tokenizer'][name]!r}")
    for split in manifest["splits"].values():
        for found in split["skipped"].values():
            _count(found["count"])
        for shard in split["shards"]:
            _count(shard["documents"])
            if not shard["files"]:
                raise ValueError("a shard without files")
            for file in shard["files"]:
                _count(file["size"])
                name, sha256 = file["name"], file["sha256"]
                if not isinstance(sha256, str) or not re.fullmatch(r"[\w.-]+", name, re.ASCII):
                    raise ValueError(f"file {name!r} with checksum {sha256!r}")
        if not split["shards"]:
            raise ValueError("a split without shards")


def _count(value: Any) -> None:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r} is no count")


def _sizes(path: Path, count: int) -> np.ndarray:
    """int64 [count] of a file of sizes. What its header says is held against the file before
    anything is allocated. Raises DataError."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's reader of headers raises whatever Python's own parser does
        raise DataError(f"{path}: no file of sizes: {str(error).splitlines()[0]}") from error
    if array.shape != (count,) or array.dtype != np.int64:
        raise DataError(f"{path}: {array.dtype} {array.shape}; it should be int64 ({count},)")
    return np.array(array)


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a build: a line for each file that is missing or not as it was written."""
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    wrong = []
    for file in files_of(manifest):
        path = folder / file["name"]
        try:
            _check_size(path, file["size"])
        except DataError as error:
            wrong.append(str(error))
            continue
        if checksum(path) != file["sha256"]:
            wrong.append(f"{path}: its checksum is not the manifest's")
    return wrong


def files_of(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The files of a build, each {"name", "size" in bytes, "sha256"}."""
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            yield from shard["files"]


def open_records(path: str | Path) -> Any:
    """A reader of an ArrayRecord file: ``num_records()``, ``read([i])``. Raises DataError."""
    try:
        reader = array_record().ArrayRecordReader(
            str(path), READER, file_reader_buffer_size=READER_BUFFER
        )
        if not reader.ok():  # else it would pass for a file of no records
            reader.read([0])
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(f"{path}: no ArrayRecord file, or cut off: {error}") from error
    return reader


def array_record() -> Any:
    """array_record's reader and writer; grain brings the package."""
    return importlib.import_module("array_record.python.array_record_module")


def sizes_name(name: str) -> str:
    """The file of sizes that lies beside a shard."""
    return name.removesuffix(".arrayrecord") + ".sizes.npy"


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if found != size:
        raise DataError(f"{path}: it has {found} bytes, and {size} when it was built")
