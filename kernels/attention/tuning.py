"""What the TPU kernels are told of the chip: how much of its memory to use, and in which blocks to
work. The blocks are those that won in ``tuned.py``, by the compiler's schedule."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax

from kernels.attention import tuned


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Most queries and keys of a block, and queries of a chunk within it; multiples of 128."""

    forward: int = 1024
    backward: int = 1024
    forward_chunk: int = 128
    backward_chunk: int = 256


@dataclasses.dataclass(frozen=True)
class Chip:
    """kinds: what JAX calls the device. vmem: bytes of a core's own memory, of which libtpu 0.0.42
    refuses a kernel more."""

    name: str
    kinds: tuple[str, ...]
    vmem: int


CHIPS = (
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 128 << 20),
    Chip("v5p", ("TPU v5", "TPU v5p"), 64 << 20),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 128 << 20),
    Chip("v4", ("TPU v4",), 16 << 20),
    Chip("7x", ("TPU7x",), 64 << 20),
)
_aim: contextvars.ContextVar[Chip | None] = contextvars.ContextVar("aim", default=None)


@contextlib.contextmanager
def aiming_at(name: str) -> Iterator[None]:
    """While a program is traced for a chip that is not there, e.g. "v5p"."""
    token = _aim.set(next(chip for chip in CHIPS if chip.name == name))
    try:
        yield
    finally:
        _aim.reset(token)


def chip() -> Chip:
    """The chip that is traced for: that of ``aiming_at``, or the one that is here, or v5e."""
    aim = _aim.get()
    if aim is not None or jax.default_backend() != "tpu":
        return aim or CHIPS[0]
    kind = jax.devices()[0].device_kind
    return next((chip for chip in CHIPS if kind in chip.kinds), CHIPS[0])


def best_sizes(width: int, biased: bool, length: int) -> Sizes:
    """What won on this chip (or on v5e, where nothing was tried on it) with heads at least so wide,
    with a relative bias or without, at the greatest length tried that is not above ``length``."""
    rows = tuned.SIZES.get(chip().name, tuned.SIZES["v5e"])
    wide = min((w for w, _ in rows if w >= width), default=max(w for w, _ in rows))
    by_length = rows[wide, biased]
    tried = max((n for n in by_length if n <= length), default=min(by_length))
    return Sizes(*by_length[tried])
