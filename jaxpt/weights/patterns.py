"""Patterns of sparsity: which entries of a matrix are held together, and which compete."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.weights.selection import top


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A matrix [d_in, d_out] as an array of *units*, each of which is held or not.

    ``grid`` is that array's shape. Units compete along its ``axes``; the others number competitions
    that each keep the same share. Arrays of units and matrices may have axes before these, those
    of a stack of layers, say.
    """

    axes = (-2, -1)  # of the grid, along which units compete

    def grid(self, d_in: int, d_out: int) -> tuple[int, ...]:
        """Shape of the array of units. Raises ConfigError for a matrix that has none."""
        raise NotImplementedError

    def mean(self, matrix: jax.Array) -> jax.Array:
        """[..., d_in, d_out] -> [..., *grid]: the mean of each unit's entries."""
        raise NotImplementedError

    def spread(self, units: jax.Array, d_in: int, d_out: int) -> jax.Array:
        """[..., *grid] -> [..., d_in, d_out]: every entry has its unit's value."""
        raise NotImplementedError

    def competing(self, d_in: int, d_out: int) -> int:
        """Units of one competition."""
        grid = self.grid(d_in, d_out)
        return math.prod(grid[axis] for axis in self.axes)

    def competitions(self, d_in: int, d_out: int) -> int:
        """How many competitions there are in one matrix."""
        return math.prod(self.grid(d_in, d_out)) // self.competing(d_in, d_out)

    def count(self, density: float, d_in: int, d_out: int) -> int:
        """Units that each competition keeps at a density: the nearest number, at least 1."""
        return max(1, math.floor(density * self.competing(d_in, d_out) + 0.5))

    def top(self, scores: jax.Array, count: jax.Array | int) -> jax.Array:
        """[..., *grid] -> bool: the ``count`` units of the largest scores of each competition, and
        of equal ones the first. (``count`` may be an array, of 1 along ``axes``.)"""
        return top(scores, count, self.axes)

    def held(self, support: jax.Array) -> jax.Array:
        """Units held by each competition, int32; of 1 along ``axes``."""
        return jnp.sum(support, axis=self.axes, keepdims=True, dtype=jnp.int32)

    def draw(self, key: jax.Array, count: int, d_in: int, d_out: int) -> jax.Array:
        """bool [*grid] with ``count`` units at random in each competition."""
        return self.top(jax.random.bits(key, self.grid(d_in, d_out), jnp.uint32), count)


@dataclasses.dataclass(frozen=True)
class Entries(Pattern):
    """Every entry is a unit and competes with all of its matrix (unstructured sparsity)."""

    def grid(self, d_in, d_out):
        return d_in, d_out

    def mean(self, matrix):
        return matrix

    def spread(self, units, d_in, d_out):
        return units


@dataclasses.dataclass(frozen=True)
class Groups(Pattern):
    """Every entry is a unit and competes within ``size`` consecutive inputs of its output: N:M
    sparsity with M = ``size``. Of each group N = density M are held: 2:4 is ``Groups(4)`` at 0.5.

    Consecutive inputs are what a product sums over, as the hardware that knows 2:4 wants it.
    """

    size: int = 4  # consecutive inputs that make a group: M of N:M

    axes = (-2,)

    def __post_init__(self):
        if self.size < 2:
            raise ConfigError("size", f"{self.size} is not valid; give 2 or more")

    def grid(self, d_in, d_out):
        if d_in % self.size:
            raise ConfigError("size", f"{self.size} does not divide the {d_in} inputs")
        return d_in // self.size, self.size, d_out

    def mean(self, matrix):
        *lead, d_in, d_out = matrix.shape
        return matrix.reshape(*lead, *self.grid(d_in, d_out))

    def spread(self, units, d_in, d_out):
        return units.reshape(*units.shape[:-3], d_in, d_out)


@dataclasses.dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of ``rows`` x ``columns`` entries are units, which compete with all of their matrix.

    Where a side is no multiple, its last blocks are smaller.
    """

    rows: int = 32  # inputs of a block
    columns: int = 32  # outputs of a block

    def __post_init__(self):
        for name in ("rows", "columns"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is not valid; give 1 or more")

    def grid(self, d_in, d_out):
        return -(-d_in // self.rows), -(-d_out // self.columns)

    def mean(self, matrix):
        *lead, d_in, d_out = matrix.shape
        n, m = self.grid(d_in, d_out)
        room = (n * self.rows - d_in, m * self.columns - d_out)
        padded = jnp.pad(matrix, [(0, 0)] * len(lead) + [(0, more) for more in room])
        blocks = padded.reshape(*lead, n, self.rows, m, self.columns)
        rows = jnp.minimum(self.rows, d_in - self.rows * jnp.arange(n))
        columns = jnp.minimum(self.columns, d_out - self.columns * jnp.arange(m))
        return blocks.sum((-3, -1)) / (rows[:, None] * columns).astype(matrix.dtype)

    def spread(self, units, d_in, d_out):
        rows = jnp.repeat(units, self.rows, axis=-2, total_repeat_length=None)[..., :d_in, :]
        return jnp.repeat(rows, self.columns, axis=-1)[..., :d_out]
