"""Documents in files: found by glob, indexed once, read where they lie.

Plain files are read through once when they are opened (to find where documents begin, and that
they can be used), and then document by document on access: 16 bytes of memory a document.
Compressed files (``.gz``, ``.zst``) are kept in memory, decompressed.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import gzip
import mmap
import os
import re
import zlib
from collections.abc import Callable, Sequence
from typing import BinaryIO, Literal, cast

import numpy as np

from jaxpt.data.base import EmptySplit, Split, check_split, unit_hash
from jaxpt.data.skips import (
    BLANK,
    BLANK_LINE,
    BROKEN,
    NOT_UTF8,
    Bad,
    Errors,
    Skips,
    merged,
)
from jaxpt.errors import ConfigError, DataError

Globs = str | tuple[str, ...]
Unit = Literal["file", "paragraph", "line"]
Parse = Callable[[bytes], str]  # raises Bad
CHUNK = 1 << 24  # bytes that are checked at a time
# A compressed file may come to so much; more is no text, but a trap (text comes to 3 to 100 times).
SMALL, RATIO = 1 << 28, 200
PART = 1 << 12  # bytes of a compressed file at a time: each block of it may come to 128 KiB
ENDINGS = (".gz", ".zst", ".zstd")


@dataclasses.dataclass(frozen=True)
class Index:
    """Where the documents of a file lie, in bytes (of its text, if it is compressed)."""

    path: str
    stamp: tuple[int, int]  # the file's size and time
    packed: bool  # compressed
    starts: np.ndarray  # int64 [documents]
    ends: np.ndarray  # int64 [documents]
    skips: Skips  # what is no document


class Documents(Sequence[str]):
    """Documents of several files, read on access; ``parse`` makes text of a document's bytes."""

    def __init__(self, files: Sequence[Index], parse: Parse):
        self.files, self.parse = tuple(files), parse
        self.last = np.cumsum([len(file.starts) for file in self.files])

    def __len__(self) -> int:
        return int(self.last[-1]) if len(self.last) else 0

    def sizes(self) -> np.ndarray:
        """Bytes of each document, int64."""
        return np.concatenate([file.ends - file.starts for file in self.files])

    @property
    def skips(self) -> Skips:
        """What was left out, with the places of the first."""
        return merged(file.skips for file in self.files)

    @property
    def skipped(self) -> dict[str, int]:
        """How many documents were left out, by reason.

        Where training and validation share files, the training split counts them.
        """
        return self.skips.counts

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        which = int(np.searchsorted(self.last, index, side="right"))
        file = self.files[which]
        i = index - (int(self.last[which - 1]) if which else 0)
        start, end = int(file.starts[i]), int(file.ends[i])
        try:
            return self.parse(_read(file, start, end))
        except Bad as bad:
            line = 1 + _read(file, 0, start).count(b"\n")
            raise bad.at(f"{file.path}, line {line}") from None


def open_documents(
    globs: Globs,
    validation: Globs | None,
    holdout: float,
    split: Split,
    unit: Unit,
    parse: Parse,
    errors: Errors = "raise",
    check: bool = False,
) -> Documents:
    """The documents of a split of the files that globs match.

    Where ``validation`` is None, the documents of ``globs`` whose bytes hash below ``holdout`` are
    the validation split, so that equal documents are on the same side.

    Args:
      parse: makes text of a document's bytes; picklable, hashable.
      errors: what to do about documents that cannot be used.
      check: parse every document now.

    Raises:
      ConfigError: a glob that matches nothing.
      EmptySplit: a split without documents.
      DataError: a file that cannot be read or decompressed; where ``errors`` is raise, also a
        document that is not UTF-8 or, with ``check``, does not parse, with its line.
    """
    check_split(split)
    held = validation is None
    name = "train" if held or split == "train" else "validation"
    paths = find(globs if held or split == "train" else validation, name)
    checked = parse if check else None
    files = [_index(path, stamp(path), unit, errors, checked) for path in paths]
    if held:
        files = [_part(file, holdout, split) for file in files]
    documents = Documents(files, parse)
    if not len(documents):
        raise no_documents(name, paths, split, held, documents.skipped)
    return documents


def no_documents(
    name: str, paths: Sequence[str], split: Split, held: bool, skipped: dict[str, int]
) -> EmptySplit:
    """The error for files that give a split nothing."""
    files = "1 file has no" if len(paths) == 1 else f"none of {len(paths)} files has a"
    text = f"{files} document in split {split!r}"
    if skipped:
        text += f"; left out: {', '.join(f'{n} x {reason}' for reason, n in skipped.items())}"
    return EmptySplit(
        name, text + ("; name files for validation, or hold out more" if held else "")
    )


def find(globs: Globs | None, field: str) -> list[str]:
    """The files that globs match, sorted, each once. ConfigError where one matches nothing."""
    paths: set[str] = set()
    for pattern in (globs,) if isinstance(globs, str) else globs or ():
        found = [
            path
            for path in glob.glob(os.path.expanduser(pattern), recursive=True)
            if os.path.isfile(path)
        ]
        if not found:
            raise ConfigError(field, f"{pattern!r} matches no file (from {os.getcwd()})")
        paths.update(found)
    if not paths:
        raise ConfigError(field, "no files are named; give a path or a glob")
    return sorted(paths)


def check_holdout(holdout: float) -> None:
    """Raises ConfigError unless ``holdout`` is a share."""
    if not 0 < holdout < 1:
        raise ConfigError("holdout", f"{holdout} is not valid; give a share between 0 and 1")


def stamp(path: str) -> tuple[int, int]:
    """A file's size and time: equal as long as it has not changed."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4096)
def _index(
    path: str, stamp: tuple[int, int], unit: Unit, errors: Errors, parse: Parse | None
) -> Index:
    """The documents of a file; remembered as long as its size and time stay the same."""
    packed, skips = path.endswith(ENDINGS), Skips()
    try:
        if packed:
            pieces = _documents(_unpacked(path, stamp), path, unit, errors, parse, skips)
        elif not stamp[0]:
            pieces = _documents(b"", path, unit, errors, parse, skips)
        else:
            with (
                open(path, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                pieces = _documents(data, path, unit, errors, parse, skips)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except Bad as bad:  # the whole file
        skips.reject(bad, path, errors)
        pieces = np.empty(0, np.int64), np.empty(0, np.int64)
    skips.log(path)
    return Index(path, stamp, packed, *pieces, skips)


def _documents(
    data, path: str, unit: Unit, errors: Errors, parse: Parse | None, skips: Skips
) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends) of the documents that can be used; what cannot goes to ``skips``."""
    newlines, bad = _check(data, path, errors)
    if unit == "file":
        starts, ends = np.array([0]), np.array([len(data)])
    elif unit == "line":
        starts, ends = np.append(0, newlines + 1), np.append(newlines, len(data))
        if starts[-1] == len(data):  # what follows the last newline is no line
            starts, ends = starts[:-1], ends[:-1]
    else:
        gaps = [match.span() for match in re.finditer(rb"\n(?:[^\S\n]*\n)+", data)]
        cuts = np.array(gaps, np.int64).reshape(-1, 2)
        starts, ends = np.append(0, cuts[:, 1]), np.append(cuts[:, 0], len(data))
    starts, ends = starts.astype(np.int64), ends.astype(np.int64)

    def line(start: int) -> str:
        return f"{path}, line {1 + int(np.searchsorted(newlines, start))}"

    keep = _not_blank(data, starts, ends)
    if unit == "file":
        if not keep.all():
            raise Bad(BLANK, "it is blank: it holds no text")
    elif not keep.all():
        blank = np.flatnonzero(~keep)
        skips.add(BLANK_LINE, line(int(starts[blank[0]])), len(blank))
    for i in np.unique(np.searchsorted(starts, bad, side="right") - 1):
        keep[i] = False
        skips.add(NOT_UTF8, line(int(bad[np.searchsorted(bad, starts[i])])))
    if parse is not None:
        for i in np.flatnonzero(keep).tolist():
            try:
                parse(data[int(starts[i]) : int(ends[i])])
            except Bad as wrong:
                keep[i] = False
                skips.reject(wrong, line(int(starts[i])), errors)
    return starts[keep], ends[keep]


def _not_blank(data, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool [pieces]: whether there is more than white space in each."""
    full = ends > starts
    first = np.frombuffer(data, np.uint8)[starts[full]] if full.any() else np.empty(0, np.uint8)
    unsure = np.flatnonzero(full)[first <= 32]  # begin with white space: may be nothing else
    full[[i for i in unsure if not bytes(data[starts[i] : ends[i]]).strip()]] = False
    return full


def _check(data, path: str, errors: Errors) -> tuple[np.ndarray, np.ndarray]:
    """(offsets of the newlines, offset of what is not UTF-8 in each line that has such bytes).

    Raises:
      DataError: there are bytes that are not UTF-8, and ``errors`` is raise; names the line.
    """
    newlines, bad, at = [], [], 0
    while at < len(data):
        end = min(len(data), at + CHUNK)
        for _ in range(3):  # do not cut a character, which has up to three further bytes
            end += end < len(data) and data[end] & 0xC0 == 0x80
        chunk = bytes(data[at:end])
        newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + at)
        try:
            chunk.decode("utf-8")
        except UnicodeDecodeError as error:
            if errors == "raise":
                line = 1 + sum(len(n) for n in newlines[:-1]) + chunk.count(b"\n", 0, error.start)
                wrong = Bad(NOT_UTF8, f"not UTF-8: {error.reason}")
                raise wrong.at(f"{path}, line {line}") from None
            bad += _bad_lines(chunk, at)
        at = end
    whole = np.concatenate(newlines) if newlines else np.empty(0, np.int64)
    return whole, np.array(bad, np.int64)


def _bad_lines(chunk: bytes, at: int) -> list[int]:
    """Offset of the first byte that is not UTF-8 in each line of a chunk that begins at ``at``."""
    found = []
    for line in chunk.split(b"\n"):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            found.append(at + error.start)
        at += len(line) + 1
    return found


@functools.lru_cache(maxsize=4096)
def _unpacked(path: str, stamp: tuple[int, int]) -> bytes:
    """A compressed file's text. Raises Bad where it is broken off or is no such file."""
    try:
        return _decompress(path)
    except (OSError, EOFError, zlib.error) as error:
        raise Bad(BROKEN, f"cannot be decompressed: {error}") from error


def _decompress(path: str) -> bytes:
    most = max(SMALL, RATIO * os.stat(path).st_size)
    if path.endswith(".gz"):
        with gzip.open(path, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise OSError(f"it comes to more than {most} bytes")
        return data
    with open(path, "rb") as file:
        return _unzstd(file, most)


def _unzstd(file: BinaryIO, most: int) -> bytes:
    """All frames of a file. Raises OSError where they come to more than ``most`` bytes."""
    import zstandard

    parts, total, frame, data = [], 0, None, b""
    while data or (data := file.read(PART)):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        total += len(parts[-1])
        if total > most:
            raise OSError(f"it comes to more than {most} bytes")
        data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")
    return b"".join(parts)


def _part(file: Index, holdout: float, split: Split) -> Index:
    """The file's documents that belong to a split."""
    pieces = zip(file.starts.tolist(), file.ends.tolist(), strict=True)
    if not len(file.starts):
        shares = []
    elif file.packed:
        data = _unpacked(file.path, file.stamp)
        shares = [unit_hash(data[start:end]) for start, end in pieces]
    else:
        with (
            open(file.path, "rb") as handle,
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            shares = [unit_hash(data[start:end]) for start, end in pieces]
    mine = (np.array(shares) < holdout) == (split == "validation")
    skips = file.skips if split == "train" else Skips()
    return dataclasses.replace(file, starts=file.starts[mine], ends=file.ends[mine], skips=skips)


@functools.lru_cache(maxsize=64)
def _handle(path: str, stamp: tuple[int, int]) -> BinaryIO:
    """An open file, closed when it is forgotten: opening takes longer than reading a document."""
    return cast(BinaryIO, open(path, "rb", buffering=0))


def _read(file: Index, start: int, end: int) -> bytes:
    try:
        if file.packed:
            return _unpacked(file.path, file.stamp)[start:end]
        handle = _handle(file.path, file.stamp).fileno()
        if os.fstat(handle).st_size != file.stamp[0]:
            raise DataError(f"{file.path} has changed since it was opened")
        return os.pread(handle, end - start, start)
    except OSError as error:
        raise DataError(f"{file.path}: {error.strerror}") from error
    except Bad as bad:
        raise bad.at(file.path) from None
