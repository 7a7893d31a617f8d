"""The two products, and how they are each other's derivatives, to any order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.block_sparse.places import Places

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Products:
    """One implementation, for a matrix W of whole blocks; x [T, d_in], g [T, d_out], W's blocks
    [n, block_in, block_out], all of one dtype.

    times(x, blocks, places, columns): x W [T, columns * block_out], in x's dtype.
    turned(g, blocks, places, rows): g W^T [T, rows * block_in].
    outer(x, g, places, block, dtype): x^T g at the blocks, [n, *block] in ``dtype``.
    All with sums in float32, or float64.
    """

    times: Callable[..., Array]
    turned: Callable[..., Array]
    outer: Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """What is known of W when the program is traced: rows and columns of blocks, and by which
    implementation it is multiplied."""

    rows: int
    columns: int
    by: Products


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def times(matrix: Matrix, x: Array, blocks: Array, places: Places) -> Array:
    """x W, in x's dtype; the gradient of W's blocks comes in theirs."""
    return matrix.by.times(x, blocks.astype(x.dtype), places, matrix.columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def turned(matrix: Matrix, g: Array, blocks: Array, places: Places) -> Array:
    """g W^T, in g's dtype."""
    return matrix.by.turned(g, blocks.astype(g.dtype), places, matrix.rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def outer(matrix: Matrix, x: Array, g: Array, places: Places, dtype) -> Array:
    """x^T g at the blocks, in ``dtype``."""
    block = (x.shape[1] // matrix.rows, g.shape[1] // matrix.columns)
    return matrix.by.outer(x, g.astype(x.dtype), places, block, dtype)


times.defvjp(
    lambda matrix, *given: (times(matrix, *given), given),
    lambda matrix, saved, g: _gradients_of_times(matrix, saved, g),
)
turned.defvjp(
    lambda matrix, *given: (turned(matrix, *given), given),
    lambda matrix, saved, x: _gradients_of_turned(matrix, saved, x),
)
outer.defvjp(
    lambda matrix, x, g, places, dtype: (outer(matrix, x, g, places, dtype), (x, g, places)),
    lambda matrix, dtype, saved, d: _gradients_of_outer(matrix, saved, d),
)


def _gradients_of_times(matrix: Matrix, saved, g):
    x, blocks, places = saved
    dx: Any = turned(matrix, g, blocks, places)
    return dx.astype(x.dtype), outer(matrix, x, g, places, jnp.dtype(blocks.dtype)), None


def _gradients_of_turned(matrix: Matrix, saved, x):
    g, blocks, places = saved
    dg: Any = times(matrix, x, blocks, places)
    return dg.astype(g.dtype), outer(matrix, x, g, places, jnp.dtype(blocks.dtype)), None


def _gradients_of_outer(matrix: Matrix, saved, d):
    x, g, places = saved
    dx: Any = turned(matrix, g, d, places)
    dg: Any = times(matrix, x, d, places)
    return dx.astype(x.dtype), dg.astype(g.dtype), None
