"""Whether a checkpoint holds what was saved: checksums of arrays, and the manifest of them.

A checksum does not depend on how an array is laid out: it is the same on one device and on many,
and computed where the array is. Of an array with entries x_i, whose bits are 32-bit words w_i
(two words where an entry has 64 bits; they take turns), it is

    sum_i w_i h(i)  and  sum_i w_i h(i + 2^31)    mod 2^32,    h(i) = 2 mix(i) + 1

with a fixed mixing function. As h is odd, no change of a single entry goes unseen; other damage
does with a chance of about 2^-62.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import environment, migrations
from jaxpt.errors import DataError

CHUNK = 1 << 22  # entries of an array that the host looks at together


class DamagedError(DataError):
    """A checkpoint that does not hold what was saved in it."""


def checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Name -> checksum, 16 hexadecimal digits.

    Args:
      arrays: numpy arrays, or JAX arrays, wherever they are: those on devices are summed there.
    """
    on_device = {name: x for name, x in arrays.items() if not _on_host(x)}
    sums: dict[str, Any] = jax.device_get(_device_sums(on_device)) if on_device else {}
    sums |= {name: _host_sums(np.asarray(arrays[name])) for name in arrays if name not in sums}
    return {name: "".join(f"{int(s):08x}" for s in sums[name]) for name in arrays}


def manifest(
    step: int, arrays: Mapping[str, Any], progress: Mapping[str, Any], config: str | None
) -> dict[str, Any]:
    """What a checkpoint should hold, as a JSON object.

    Args:
      step: that it is named by.
      arrays: by path.
      progress: the JSON object saved with them.
      config: the run's config.json; None where there is none.
    """
    sums = checksums(arrays)
    found = {
        "format": migrations.FORMAT,
        "step": step,
        "arrays": {
            path: {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": sums[path]}
            for path, x in arrays.items()
        },
        "progress": digest(progress),
        "config": None if config is None else hashlib.sha256(config.encode()).hexdigest(),
        "versions": environment.versions(),
    }
    return found | {"digest": digest(found)}


def is_whole(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is as it was made."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return manifest.get("digest") == digest(rest)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_arrays(manifest: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Holds arrays, by path, against a manifest that may have more.

    Raises:
      DamagedError: one that differs from what was saved.
    """
    for path, checksum in checksums(arrays).items():
        if checksum != manifest["arrays"][path]["checksum"]:
            raise DamagedError(f"{path} differs from what was saved")


def _on_host(x: Any) -> bool:
    if not isinstance(x, jax.Array):
        return True
    return x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())


def _words(bytes_of_entry: int) -> Any:
    """The unsigned type whose words make up an entry."""
    return {1: np.uint8, 2: np.uint16}.get(bytes_of_entry, np.uint32)


def _mix(module: Any, x: Any) -> Any:
    """Spreads the bits of uint32 (Mueller's mixing function, twice the multiply and shift)."""
    for _ in range(2):
        x = ((x >> module.uint32(16)) ^ x) * module.uint32(0x45D9F3B)
    return (x >> module.uint32(16)) ^ x


def _weighted(module: Any, words: Any, index: Any, half: int) -> Any:
    odd = _mix(module, index + module.uint32(half)) * module.uint32(2) + module.uint32(1)
    return module.sum(words * odd, dtype=module.uint32)


def _host_sums(x: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(x).reshape(-1).view(_words(x.dtype.itemsize))
    total = np.zeros(2, np.uint32)
    for start in range(0, words.size, CHUNK):
        part = words[start : start + CHUNK].astype(np.uint32)
        index = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        total += np.stack([_weighted(np, part, index, half) for half in (0, 1 << 31)])
    return total


@jax.jit
def _device_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _device_sum(x) for name, x in arrays.items()}


def _device_sum(x: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(_as_bits(x), _words(x.dtype.itemsize)).astype(jnp.uint32)
    # The index is made axis by axis, so that arrays cut over devices stay where they are.
    strides = [math.prod(words.shape[axis + 1 :]) % 2**32 for axis in range(words.ndim)]
    index = functools.reduce(
        jnp.add,
        (
            jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
            for axis, stride in enumerate(strides)
        ),
        jnp.zeros(words.shape, jnp.uint32),
    )
    return jnp.stack([_weighted(jnp, words, index, half) for half in (0, 1 << 31)])


def _as_bits(x: jax.Array) -> jax.Array:
    return x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
