"""Which entries of a matrix are held one by one, and how they get there and back.

Two layouts, told apart by ``group``:

    group = n   exactly one entry of every n consecutive ones of a row (the last group of a row may
                be shorter): values and indices [d_in, ceil(d_out / n)], an index is the place
                within the group, uint8. Made by comparing places with it: no scatter and, but on
                CPUs, no gather; rows and groups may lie on devices of their own.
    group None  any entries: values and indices [count], an index is the entry's number, row by
                row, int32, distinct and in ascending order. Scatter and gather are told so: with
                repeated or unordered indices some backends need atomic updates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.platform import platform


def held_shape(d_in: int, d_out: int, group: int) -> tuple[int, int]:
    """Shape of values and indices where one entry of every ``group`` is held."""
    return d_in, -(-d_out // group)


def spread(
    values: jax.Array, indices: jax.Array, d_in: int, d_out: int, group: int | None
) -> jax.Array:
    """The matrix [d_in, d_out] with the values at their places and 0 elsewhere, in their dtype."""
    if group is None:
        return plus(jnp.zeros((d_in, d_out), values.dtype), values, indices, group)
    held = jnp.where(_held(indices, group), values[..., None], 0)
    return held.reshape(d_in, -1)[:, :d_out]


def plus(matrix: jax.Array, values: jax.Array, indices: jax.Array, group: int | None) -> jax.Array:
    """A matrix [d_in, d_out] with the values, in its dtype, added at their places."""
    if group is not None:
        d_in, d_out = matrix.shape
        return matrix + spread(values, indices, d_in, d_out, group)
    flat = matrix.reshape(-1).at[indices]
    made = flat.add(values, unique_indices=True, indices_are_sorted=True)
    return made.reshape(matrix.shape)


def gather(matrix: jax.Array, indices: jax.Array, group: int | None) -> jax.Array:
    """The entries of a matrix at the values' places: the transpose of ``spread``."""
    if group is None:
        return matrix.reshape(-1).at[indices].get(unique_indices=True, indices_are_sorted=True)
    if platform() == "cpu":
        # Ten times as fast there as the sum, which XLA does not fuse with what it sums.
        first = jnp.arange(indices.shape[1], dtype=jnp.int32) * group
        return jnp.take_along_axis(matrix, first + indices, 1, mode="promise_in_bounds")
    rest = indices.shape[1] * group - matrix.shape[1]
    groups = jnp.pad(matrix, ((0, 0), (0, rest))).reshape(*indices.shape, group)
    return jnp.where(_held(indices, group), groups, 0).sum(-1)


def _held(indices, group):
    return indices[..., None] == jnp.arange(group, dtype=indices.dtype)
