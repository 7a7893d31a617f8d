"""Files of a run's folder: written whole or not at all, and read whatever was interrupted.

JSON has no NaN and no infinity. A number that is not finite is written as one of the strings
``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` (as protocol buffers do): valid JSON for every
reader, nothing is lost, and Python's ``float()`` and JavaScript's ``Number()`` both take them.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def write_atomic(path: str | os.PathLike, data: str | bytes, *, durable: bool = True) -> Path:
    """Writes a file so that a reader, or a kill at any moment, finds the old one or the new one.

    Args:
      data: text (written as UTF-8) or bytes.
      durable: wait until the bytes are on the disk, so that a power cut cannot lose them either.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def plain(value: Any) -> Any:
    """``value`` made of what JSON knows: NumPy and JAX scalars and arrays become numbers and lists.

    Raises:
      TypeError: something that has no meaning in JSON, with its type.
    """
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def number(value: Any) -> float:
    """The float that ``plain`` wrote: ``"NaN"`` and the infinities become floats again, null NaN.

    Raises:
      ValueError: ``value`` is no number that ``plain`` writes.
    """
    if value is None:
        return math.nan
    if isinstance(value, str) and value not in NOT_FINITE:
        raise ValueError(f"{value!r} is no number")
    return float(value)


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Valid JSON of anything ``plain`` takes."""
    return json.dumps(plain(value), allow_nan=False, indent=indent, ensure_ascii=False)


def write_json(path: str | os.PathLike, value: Any, *, durable: bool = True) -> Path:
    """``value`` as indented JSON, atomically."""
    return write_atomic(path, dumps(value, indent=2) + "\n", durable=durable)


def read_json(path: str | os.PathLike, default: Any = None) -> Any:
    """What the file holds, or ``default`` where there is none.

    Raises:
      ValueError: the file is there and is not JSON; names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def read_row(line: bytes | str) -> dict[str, Any] | None:
    """One line of metrics.jsonl, or None where it is torn: no whole object with a step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and type(row.get("step")) is int
    return row if whole else None


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; none where there is no file, torn lines left out."""
    try:
        with open(path, "rb") as file:
            rows = [read_row(line) for line in file]
    except FileNotFoundError:
        return []
    return [row for row in rows if row is not None]
