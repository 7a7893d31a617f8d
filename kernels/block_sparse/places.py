"""Where the blocks of a matrix lie, and how they get there and back.

A matrix [d_in, d_out] is a grid of blocks [block_in, block_out]; those at its right and lower
edges may reach beyond it, where their entries count for nothing. ``rows`` and ``columns``, int32
[n], are the places of the n blocks that are held, distinct and in any order: so a block may move
while its neighbours in memory, and whatever belongs to them elsewhere, stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Places(NamedTuple):
    """rows, columns: int32 [n]. by_column, by_row: int32 [n], the blocks' numbers in the order of
    their columns (rows), and within one of their rows (columns)."""

    rows: Any
    columns: Any
    by_column: Any
    by_row: Any

    @property
    def turned(self) -> Places:
        """Of the transposed matrix."""
        return Places(self.columns, self.rows, self.by_row, self.by_column)


def places_of(rows, columns) -> Places:
    """The places with both orders; from numpy's arrays come numpy's."""
    xp = np if isinstance(rows, np.ndarray) and isinstance(columns, np.ndarray) else jnp
    rows, columns = (xp.asarray(x, dtype=xp.int32) for x in (rows, columns))
    by_column, by_row = (
        xp.lexsort(keys).astype(xp.int32) for keys in ((rows, columns), (columns, rows))
    )
    return Places(rows, columns, by_column, by_row)


class Steps(NamedTuple):
    """The blocks column by column, ``each`` at a time, all of a step in one column.

    column: int32 [s]. ids: int32 [s, each], which block; beyond ``held`` [s] of them any. first:
    [s], the place of the step's first block in the order of columns. ends: [columns], before which
    step a column's end; what follows the last one's holds nothing.
    """

    column: Any
    ids: Any
    held: Any
    first: Any
    ends: Any


def steps_of(places: Places, columns: int, each: int) -> Steps:
    """The steps of a matrix with so many columns of blocks. From numpy's arrays come numpy's, and
    no more than needed."""
    xp: Any = np if isinstance(places.columns, np.ndarray) else jnp
    n = places.columns.shape[0]

    find = np.searchsorted if xp is np else partial(jnp.searchsorted, method="compare_all")

    edges = find(places.columns[places.by_column], xp.arange(columns + 1))
    steps = -(-(edges[1:] - edges[:-1]) // each)
    ends = xp.cumsum(steps)
    s = xp.arange(int(ends[-1]) if xp is np else n // each + columns)
    column = xp.minimum(find(ends, s, side="right"), columns - 1)
    first = edges[column] + (s - (ends - steps)[column]) * each
    held = xp.clip(edges[column + 1] - first, 0, each)
    ids = places.by_column[xp.minimum(first[:, None] + xp.arange(each), n - 1)]
    return Steps(*(x.astype(xp.int32) for x in (column, ids, held, first, ends)))


def in_a_step(n: int, columns: int, size: int, most: int) -> int:
    """How many blocks to do at once, of ``size`` rows each and ``most`` in all: such that columns
    with an equal share of the n blocks leave no step half empty."""
    share, fitting = -(-n // columns), max(1, most // size)
    return -(-share // -(-share // fitting))


def grid_of(d_in: int, d_out: int, block: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of blocks of so many inputs and outputs."""
    return -(-d_in // block[0]), -(-d_out // block[1])


def joined(blocks, rows, columns, grid: tuple[int, int]):
    """(blocks [n, ..], rows [n], columns [n]) of one matrix from those of its parts.

    The grid is cut into [gi, gj] equal parts, each with so many blocks of its own: blocks
    [gi, gj, m, ..], and rows and columns [gi, gj, m] count from the part's corner.
    """
    (gi, gj, m), (high, wide) = rows.shape, grid
    rows = rows + (jnp.arange(gi, dtype=rows.dtype) * (high // gi))[:, None, None]
    columns = columns + (jnp.arange(gj, dtype=columns.dtype) * (wide // gj))[:, None]
    n = gi * gj * m
    return blocks.reshape(n, *blocks.shape[3:]), rows.reshape(n), columns.reshape(n)


def tiled(matrix: jax.Array, block: tuple[int, int]) -> jax.Array:
    """A matrix [d_in, d_out] as [rows, columns, block_in, block_out], filled up with zeros."""
    (d_in, d_out), (bi, bo) = matrix.shape, block
    high, wide = grid_of(d_in, d_out, block)
    matrix = jnp.pad(matrix, ((0, high * bi - d_in), (0, wide * bo - d_out)))
    return matrix.reshape(high, bi, wide, bo).swapaxes(1, 2)


def gather(matrix: jax.Array, rows, columns, block: tuple[int, int]) -> jax.Array:
    """The blocks [n, *block] of a matrix [d_in, d_out] at these places: ``spread``'s transpose."""
    return tiled(matrix, block).at[rows, columns].get(mode="promise_in_bounds")


def spread(blocks: jax.Array, rows, columns, d_in: int, d_out: int) -> jax.Array:
    """The matrix [d_in, d_out] with the blocks [n, block_in, block_out] at their places."""
    block = blocks.shape[1:]
    high, wide = grid_of(d_in, d_out, block)
    number = rows * wide + columns
    order = jnp.argsort(number)
    tiles = jnp.zeros((high * wide, *block), blocks.dtype)
    tiles = tiles.at[number[order]].set(
        blocks[order], unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds"
    )
    tiles = tiles.reshape(high, wide, *block).swapaxes(1, 2)
    return tiles.reshape(high * block[0], wide * block[1])[:d_in, :d_out]


def norms(matrix: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Squared norms of a matrix's blocks, float32 [rows, columns]."""
    return jnp.sum(jnp.square(tiled(matrix, block).astype(jnp.float32)), axis=(2, 3))
