"""Which probabilities dropout takes: a hash of the row's seed, the query's and the key's number.

Every implementation computes the same, entry by entry and in any order, so that they drop the same
ones, forward and backward, whole or in blocks, on one device or over a mesh.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BITS = 24  # of the hash that a rate is compared with
STEPS = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77)  # odd, about 2^32 / 1.6 and / 1.9


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "columns"], meta_fields=["rate"]
)
@dataclasses.dataclass(frozen=True)
class Dropout:
    """rate: of entries that are dropped. rows, columns: int32 [B, N, T] and [B, N, S], the share
    of each query and of each key in the hash of their entry."""

    rate: float
    rows: jax.Array
    columns: jax.Array


def drawn(rate: float, key: jax.Array, batch: int, heads: int, queries: int, keys: int) -> Dropout:
    """Dropout by a PRNG key."""
    seeds = jax.random.bits(key, (2, batch, heads, 1), jnp.uint32)
    rows, columns = (
        mix(lax.bitcast_convert_type(seed + jnp.arange(n, dtype=jnp.uint32) * step, jnp.int32))
        for seed, n, step in zip(seeds, (queries, keys), STEPS, strict=True)
    )
    return Dropout(rate, rows, columns)


def mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer of int32 (Appleby 2011): every bit depends on all."""
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        x = (x ^ lax.shift_right_logical(x, np.int32(shift))) * np.int32(factor)
    return x ^ lax.shift_right_logical(x, jnp.int32(16))


def kept(rate: float, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Which entries stay, bool, of int32 that are broadcast to the entries' shape."""
    bits = lax.shift_right_logical(mix(rows + columns), np.int32(32 - BITS))
    return bits >= round(rate * 2**BITS)


def kept_of(dropout: Dropout) -> jax.Array:
    """Of all entries, bool [B, N, T, S]."""
    return kept(dropout.rate, dropout.rows[..., None], dropout.columns[:, :, None])
