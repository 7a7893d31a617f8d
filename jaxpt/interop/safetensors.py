"""Files of the safetensors format: 8 bytes with the header's length, a JSON header, the arrays.

Read and written here, because the library's NumPy half knows no bfloat16 where torch is not there,
and because nothing that a header claims is to be believed before it has been held against the file.
https://github.com/huggingface/safetensors describes the format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxpt.errors import DataError

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the library's own limit
METADATA = "__metadata__"
MAX_AXES, MAX_AXIS = 32, 1 << 40  # of any array that somebody could want


class SafeTensors(Mapping[str, np.ndarray]):
    """The arrays of a file, by name, in the order of their names. Each is read when it is asked
    for, as a read-only view of the file.

    metadata: string -> string, as the writer left it.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads the header alone. Raises DataError where the file is not whole and sound."""
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_HEADER):
                    raise self._wrong(f"its header cannot be {length} bytes of {size}")
                raw = file.read(length)
        except (OSError, ValueError) as error:  # a name may have what no file's can
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path}: {getattr(error, 'strerror', error)}") from error
        self._start, self._data = 8 + length, size - 8 - length
        self._rows = self._parse(raw)
        self._bytes: np.ndarray | None = None

    def _parse(self, raw: bytes) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
        """Name -> (dtype, shape, first byte)."""
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=self._no_twins)
        except (ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise self._wrong(f"its header is no JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._wrong("its header is no JSON object")
        self.metadata = header.pop(METADATA, {})
        strings = isinstance(self.metadata, dict) and all(
            isinstance(value, str) for value in self.metadata.values()
        )
        if not strings:
            raise self._wrong(f"its {METADATA} is no object of strings")
        rows, spans = {}, []
        for name in sorted(header):
            dtype, shape, begin, end = self._row(name, header[name])
            rows[name] = dtype, shape, begin
            spans.append((begin, end, name))
        at = 0
        for begin, end, name in sorted(spans):
            if begin != at:
                raise self._wrong(
                    f"{name} begins at byte {begin}, and the array before ends at {at}"
                )
            at = end
        if at != self._data:
            raise self._wrong(f"its arrays take {at} bytes, and it has {self._data} for them")
        return rows

    def _row(self, name: str, row: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
        if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._wrong(f"{name} is not described by dtype, shape and data_offsets")
        shape, offsets = row["shape"], row["data_offsets"]
        if not isinstance(row["dtype"], str) or row["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise self._wrong(f"{name} has dtype {row['dtype']!r}; it can be {known}")
        whole = [shape, offsets]
        if not all(
            isinstance(x, list) and all(type(n) is int and n >= 0 for n in x) for x in whole
        ):
            raise self._wrong(f"{name} has shape {shape} and data_offsets {offsets}")
        # Of an array with an axis of 0 nothing else bounds the others.
        if len(shape) > MAX_AXES or max(shape, default=0) > MAX_AXIS:
            raise self._wrong(f"{name} cannot have {len(shape)} axes, up to {max(shape)} long")
        dtype = np.dtype(DTYPES[row["dtype"]])
        nbytes = math.prod(shape) * dtype.itemsize
        if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
            raise self._wrong(f"{name} of {nbytes} bytes cannot lie at {offsets}")
        return dtype, tuple(shape), *offsets

    def _no_twins(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise self._wrong("its header has a name twice")
        return found

    def _wrong(self, why: str) -> DataError:
        return DataError(f"{self.path}: not a sound safetensors file: {why}")

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, begin = self._rows[name]
        if self._bytes is None:
            self._bytes = (
                np.memmap(self.path, np.uint8, "r") if self._data else np.zeros(0, np.uint8)
            )
        start = self._start + begin
        end = start + math.prod(shape) * dtype.itemsize
        return self._bytes[start:end].view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array, without reading it."""
        return self._rows[name][1]

    def dtype(self, name: str) -> np.dtype:
        """Of an array, without reading it."""
        return self._rows[name][0]


def write(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, and waits until it is on the disk.

    Args:
      arrays: by name; wide entries come first, so that every array is aligned.
      metadata: transformers refuses a file whose ``format`` is not ``pt``.

    Raises:
      TypeError: an array of a dtype that the format lacks.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    ordered = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    at = 0
    for name in ordered:
        array = arrays[name]
        if array.dtype not in NAMES:
            raise TypeError(f"{name}: safetensors has no {array.dtype}")
        offsets = [at, at := at + array.nbytes]
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in ordered:
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
