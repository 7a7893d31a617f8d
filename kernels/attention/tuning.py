"""What the TPU kernels are told of the chip: how much of its memory to use, and in which blocks to
work. The blocks are those that won in ``tuned.py``, by the compiler's schedule."""

from __future__ import annotations

import dataclasses

from kernels.attention import tuned
from kernels.platform import device


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


def chip() -> Chip:
    """The chip that the program is for; v5e where that is none of ``CHIPS``."""
    kind = getattr(device(), "device_kind", None)
    return next((chip for chip in CHIPS if kind in chip.kinds), CHIPS[0])


def origin() -> str:
    """Where the blocks that the kernels use on this chip come from."""
    name = chip().name if chip().name in tuned.MADE else CHIPS[0].name
    return f"blocks as won for {name}: {'; '.join(tuned.MADE.get(name, ()))}"


def best_sizes(width: int, biased: bool, length: int) -> Sizes:
    """What won on this chip (or on v5e, where nothing was tried on it) with heads at least so wide,
    with a relative bias or without, at the greatest length tried that is not above ``length``."""
    rows = tuned.SIZES.get(chip().name, tuned.SIZES["v5e"])
    wide = min((w for w, _ in rows if w >= width), default=max(w for w, _ in rows))
    by_length = rows[wide, biased]
    tried = max((n for n in by_length if n <= length), default=min(by_length))
    return Sizes(*by_length[tried])
