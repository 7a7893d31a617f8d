"""The largest of many scores: so many, exactly, and of equal ones the first."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def top(scores: jax.Array, count: jax.Array | int, axes: tuple[int, ...]) -> jax.Array:
    """Whether each score is among the ``count`` largest of those that it competes with.

    Nothing is sorted and nothing moved: the threshold is found by halving, of the scores' bits and,
    where there are ties, of the position. Each of these some 32 (or 64) rounds counts, so that
    scores may lie on many devices, and what goes between these is the counts.

    Args:
      scores: float32, bfloat16 or uint32; NaN counts as the largest.
      count: how many are taken along ``axes``: a number, or an array of integers that has 1 for
        each of ``axes``. All where there are no more.
      axes: over which scores compete; the other axes are competitions of their own.

    Returns:
      bool, of the scores' shape, with exactly ``count`` True in each competition; of equal scores
      those that come first, in order of the axes.
    """
    return top_of_all({"": scores}, count, axes)[""]


def top_of_all(
    scores: Mapping[str, jax.Array], count: jax.Array | int, axes: tuple[int, ...] | None = None
) -> dict[str, jax.Array]:
    """``top``, where the scores of one competition stand in several arrays: the first array's come
    first. Without ``axes`` all of all arrays compete; else the other axes have equal sizes."""
    keys = {name: _keys(x) for name, x in scores.items()}
    places, total = {}, 0
    for name, x in scores.items():
        own = range(x.ndim) if axes is None else sorted(axis % x.ndim for axis in axes)
        place, size = jnp.uint32(total), 1
        for axis in reversed(own):
            place = place + size * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            size *= x.shape[axis]
        places[name], total = place, total + size
    if total >= 2**32:
        raise ValueError(f"{total} scores compete: no more than 2^32 - 1 can")
    count = jnp.asarray(count).astype(jnp.uint32)

    def counted(test):
        found = [
            jnp.sum(test(name), axis=axes, keepdims=axes is not None, dtype=jnp.uint32)
            for name in keys
        ]
        return sum(found[1:], found[0])

    def threshold(i, least):
        """The next lower bit of the largest key that ``count`` keys reach."""
        tried = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(counted(lambda n: keys[n] >= tried) >= count, tried, least)

    none = jnp.zeros_like(counted(lambda n: keys[n] > 0))
    least = jax.lax.fori_loop(0, 32, threshold, none)
    left = count - counted(lambda n: keys[n] > least)  # to be taken of those that are equal to it
    bits = total.bit_length()

    def bound(i, end):
        """The next lower bit of the first place from which on equal ones are not taken."""
        tried = end | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        taken = counted(lambda n: (keys[n] == least) & (places[n] < tried))
        return jnp.where(taken <= left, tried, end)

    alone = jnp.all(counted(lambda n: keys[n] == least) <= left)
    end = jax.lax.fori_loop(0, jnp.where(alone, 0, bits), bound, none)
    end = jnp.where(alone, jnp.uint32(total), end)
    return {n: (k > least) | ((k == least) & (places[n] < end)) for n, k in keys.items()}


def _keys(scores: jax.Array) -> jax.Array:
    """uint32 in the scores' order."""
    if scores.dtype == jnp.uint32:
        return scores
    # By integers alone: devices may take the smallest floats for 0, and then not tell them apart.
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    negative = bits >> 31 == 1
    size = bits & jnp.uint32(0x7FFFFFFF)
    keys = jnp.where(negative & (size > 0), ~bits, size | jnp.uint32(1 << 31))
    return jnp.where(size > jnp.uint32(0x7F800000), jnp.uint32(0xFFFFFFFF), keys)
