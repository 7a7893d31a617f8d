"""A matrix in 8 bits: a code for each entry, a scale for each block of a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 256  # consecutive entries of a row that share a scale
MOST = 127  # the greatest code


def quantise(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes int8 [n, m], scales float32 [n, ceil(m / BLOCK)]) of a matrix [n, m].

    An entry is code * scale, and the block's largest has the code 127 or -127. Codes are evenly
    spaced, which suits weights (those of ``optimizers/eight_bit.py`` suit moments, whose entries
    differ by decades): the error is at most half a scale, 1/254 of the block's largest entry.
    """
    n, m = matrix.shape
    blocks = -(-m // BLOCK)
    padded = jnp.pad(matrix.astype(jnp.float32), ((0, 0), (0, blocks * BLOCK - m)))
    scales = jnp.max(jnp.abs(padded.reshape(n, blocks, BLOCK)), axis=-1) / MOST
    spread = jnp.where(scales > 0, scales, 1.0)
    return jnp.round(matrix / _spread(spread, m)).astype(jnp.int8), scales


def dequantise(codes: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """The matrix [n, m] that they stand for."""
    return (codes.astype(jnp.float32) * _spread(scales, codes.shape[1])).astype(dtype)


def _spread(scales: jax.Array, m: int) -> jax.Array:
    """A scale for each entry: an array as wide as the matrix is, so that it may be cut as that."""
    return jnp.repeat(scales, BLOCK, axis=1)[:, :m]
