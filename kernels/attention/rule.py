"""The one rule that says which query may see which key."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["first"], meta_fields=["multiple"]
)
@dataclasses.dataclass(frozen=True)
class Consecutive:
    """Positions first, first + 1, ... of every row. ``multiple``: of which ``first`` is one, for
    sure; the TPU kernels' bias takes multiples of 128."""

    first: Array | int
    multiple: int = 1


Positions = Array | Consecutive | None


def first_of(positions: Consecutive | None) -> Array | int:
    return 0 if positions is None else positions.first


def row_indices(positions: Positions, length: int) -> Array:
    """Row indices as int32 [B or 1, length]; None is 0, 1, ..."""
    if positions is None or isinstance(positions, Consecutive):
        return (first_of(positions) + jnp.arange(length, dtype=jnp.int32))[None]
    return positions[None] if positions.ndim == 1 else positions


def allowed(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    prefix: Array | None = None,
    segments: Array | None = None,
    kv_segments: Array | None = None,
    positions: Positions = None,
    kv_positions: Positions = None,
    window: int | None = None,
) -> Array | None:
    """Whether query t sees key s, bool [B or 1, T, S]; None where every query sees every key.

    segment[t] == segment[s] != 0, and (not causal or index[s] <= index[t] or prefix[s]), and
    |index[t] - index[s]| < window.
    """
    mask = None

    def both(clause):
        return clause if mask is None else mask & clause

    if causal or window is not None:
        query = row_indices(positions, queries)[:, :, None]
        key = row_indices(kv_positions, keys)[:, None, :]
        if causal:
            clause = key <= query
            mask = clause if prefix is None else clause | (prefix != 0)[:, None, :]
        if window is not None:
            mask = both(jnp.abs(query - key) < window)
    if segments is not None:
        assert kv_segments is not None
        mask = both(segments[:, :, None] == kv_segments[:, None, :])
        mask = both((kv_segments != 0)[:, None, :])
    return mask
