"""The arrays of a model, in one safetensors file or in several with an index, as transformers
names them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpt.errors import DataError
from jaxpt.files import write_json
from jaxpt.interop.safetensors import SafeTensors, write

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


class Shards(Mapping[str, np.ndarray]):
    """Name -> array of all the files of a folder, each read when it is asked for."""

    def __init__(self, folder: Path, prefix: str = "", renamed: Mapping[str, str] | None = None):
        """Reads the headers. Raises DataError where files are missing, unsound, or disagree.

        Args:
          prefix: where no name begins with it, all but the head's are taken to.
          renamed: regular expression -> what stands in the place of what it matches, in names.
        """
        self.folder, self._files = Path(folder), dict[str, tuple[SafeTensors, str]]()
        single = (self.folder / SINGLE).is_file()
        for file in [SafeTensors(self.folder / SINGLE)] if single else self._indexed():
            self._files |= {name: (file, name) for name in file}
        for pattern, new in (renamed or {}).items():
            found = {re.sub(pattern, new, n): there for n, there in self._files.items()}
            if len(found) != len(self._files):
                raise DataError(f"{self.folder}: tensors of the names {pattern} and {new} at once")
            self._files = found
        if not any(name.startswith(prefix) for name in self._files):
            self._files = {
                name if name.startswith("lm_head.") else prefix + name: there
                for name, there in self._files.items()
            }

    def _indexed(self) -> Iterator[SafeTensors]:
        path = self.folder / INDEX
        if not path.is_file():
            raise DataError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")
        places = read_object(path).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
            raise DataError(f"{path}: no weight_map from names to files")
        for name in sorted(set(places.values())):
            if Path(name).name != name:
                raise DataError(f"{path}: {name!r} is no file of this folder")
            file = SafeTensors(self.folder / name)
            promised = {tensor for tensor, there in places.items() if there == name}
            if odd := sorted(promised ^ set(file)):
                said = "lacks" if odd[0] in promised else "has beside what the index says"
                raise DataError(f"{self.folder / name} {said} {odd[0]}")
            yield file

    def __getitem__(self, name: str) -> np.ndarray:
        file, name = self._files[name]
        return file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array, without reading it."""
        file, name = self._files[name]
        return file.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Of an array, without reading it."""
        file, name = self._files[name]
        return file.dtype(name)


def write_shards(
    folder: Path, arrays: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the files of a model. One shard's arrays are in memory at a time.

    Args:
      folder: that is there, and looked at by nobody yet.
      shard_bytes: files are no longer, but for one with a single longer array.
    """
    shards: list[dict[str, Any]] = []
    held: dict[str, np.ndarray] = {}
    where: list[Path] = []
    metadata = {"format": "pt"}

    def put_down() -> None:
        where.append(folder / f"{len(where)}.part")
        write(where[-1], held, metadata)
        shards.append({name: array.nbytes for name, array in held.items()})
        held.clear()

    for name, array in arrays:
        if held and sum(x.nbytes for x in held.values()) + array.nbytes > shard_bytes:
            put_down()
        held[name] = array
    put_down()
    if len(where) == 1:
        where[0].rename(folder / SINGLE)
        return
    places = {}
    for i, (path, names) in enumerate(zip(where, shards, strict=True)):
        file = f"model-{i + 1:05d}-of-{len(where):05d}.safetensors"
        path.rename(folder / file)
        places |= dict.fromkeys(names, file)
    total = sum(sum(names.values()) for names in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: no JSON object")
    return found
