"""Dropping some of the units that are held, and growing as many others."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpt.sparsity.base import Seen
from jaxpt.weights.selection import top


def exchanged(
    seen: Seen, support: jax.Array, share: jax.Array | float, growth: jax.Array
) -> jax.Array:
    """A support of as many units as ``support``, in every competition.

    Of each matrix the share 1 - ``share`` of the units that are held, to the nearest number,
    stays: those of the largest magnitude. Then of the units that are left out, those dropped among
    them, as many are taken as were dropped, those of the largest ``growth`` (>= 0, or random
    words). In patterns of groups each group takes as many as it lost.

    Args:
      support: bool [L, *grid], part of what is held or all of it.
      growth: [L, *grid], float32 or uint32.
    """
    axes = tuple(range(1, support.ndim))
    held = jnp.sum(support, axis=axes, keepdims=True, dtype=jnp.int32)
    staying = jnp.round((1 - share) * held.astype(jnp.float32)).astype(jnp.int32)
    survivors = top(jnp.where(support, seen.magnitude, -1.0), staying, axes)
    if growth.dtype == jnp.uint32:  # the lowest bit gives way to whether it has survived
        order = (growth >> 1) | (survivors.astype(jnp.uint32) << 31)
    else:
        largest = jnp.finfo(jnp.float32).max
        order = jnp.where(survivors, jnp.inf, jnp.minimum(growth.astype(jnp.float32), largest))
    return seen.pattern.top(order, seen.pattern.held(support))
