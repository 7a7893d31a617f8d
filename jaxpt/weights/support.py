"""Supports: which entries of a matrix are held one by one, fixed at initialisation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.mesh import Axes
from kernels.low_rank_sparse import gather, held_shape, spread


@dataclasses.dataclass(frozen=True)
class Support:
    """Where the held entries of a [d_in, d_out] matrix lie. Values and indices have one shape."""

    @property
    def kept(self) -> bool:
        """Whether indices are; else the key that they are drawn with, at every use."""
        return True

    def shape(self, d_in: int, d_out: int) -> tuple[int, ...]:
        """Shape of the array of values, and of that of indices. Raises ConfigError."""
        raise NotImplementedError

    def axes(self, axes: Axes) -> Axes:
        """Logical axes of these arrays, of those of (d_in, d_out)."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        """Type of an index."""
        raise NotImplementedError

    def draw(self, key: jax.Array, d_in: int, d_out: int) -> jax.Array:
        """The indices."""
        raise NotImplementedError

    @property
    def group(self) -> int | None:
        """The layout, as ``kernels.low_rank_sparse`` has it."""
        raise NotImplementedError

    def spread(self, values: jax.Array, indices: jax.Array, d_in: int, d_out: int) -> jax.Array:
        """The matrix with the values at their places and 0 elsewhere, in the values' dtype."""
        return spread(values, indices, d_in, d_out, self.group)

    def gather(self, matrix: jax.Array, indices: jax.Array) -> jax.Array:
        """The entries of a matrix at the values' places: the transpose of ``spread``."""
        return gather(matrix, indices, self.group)


@dataclasses.dataclass(frozen=True)
class Grouped(Support):
    """One entry, at random, in every ``size`` consecutive ones of a row: density 1 / size.

    An index is one byte. The matrix is made by comparing positions with it: no scatter, no
    gather, and rows and groups of columns may lie on devices of their own. Where ``size`` does
    not divide the row, its last group is shorter. Where indices are not stored, a matrix costs as
    many random words more each time, and 1 / size bytes less an entry.
    """

    size: int = 32  # consecutive entries of a row of which one is held; at most 256
    stored: bool = True  # keep the indices; False: draw them again, from a key, at every use

    def __post_init__(self):
        if not 1 <= self.size <= 256:
            raise ConfigError("size", f"{self.size} is not valid; give 1 to 256")

    @property
    def kept(self):
        return self.stored

    @property
    def group(self):
        return self.size

    def shape(self, d_in, d_out):
        return held_shape(d_in, d_out, self.size)

    def axes(self, axes):
        return axes

    @property
    def dtype(self):
        return "uint8"

    def draw(self, key, d_in, d_out):
        shape = self.shape(d_in, d_out)
        first = jnp.arange(shape[1]) * self.size
        width = jnp.minimum(self.size, d_out - first)
        return jax.random.randint(key, shape, 0, width, jnp.int32).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Uniform(Support):
    """round(density d_in d_out) entries, all sets of so many equally likely (Han et al. 2024).

    An index is the entry's number, row by row: 4 bytes. They are distinct and in order, so that
    neither scatter nor gather has to reckon with two at one place.
    """

    density: float = 0.03  # share of the entries that are held

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise ConfigError("density", f"{self.density} does not lie in (0, 1]")

    @property
    def group(self):
        return None

    def shape(self, d_in, d_out):
        if d_in * d_out >= 2**31:
            raise ConfigError("density", f"{d_in} x {d_out} entries are too many for 4 bytes")
        return (max(1, round(self.density * d_in * d_out)),)

    def axes(self, axes):
        return (None,)

    @property
    def dtype(self):
        return "int32"

    def draw(self, key, d_in, d_out):
        # The places of the smallest of as many random words as there are entries; ties (one in
        # 2^32 a pair) go to the earlier place.
        order = jnp.argsort(jax.random.bits(key, (d_in * d_out,), jnp.uint32))
        return jnp.sort(order[: self.shape(d_in, d_out)[0]]).astype(self.dtype)
