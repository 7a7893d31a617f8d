"""A column of blocks after the other, a few blocks of it at a time.

The rows' parts of x are laid side by side, the blocks one below the other, and the two are
multiplied: one product of [T, k block_in] with [k block_in, block_out], as fast as one of a dense
matrix of that size, and no copy of x but the part in hand. Over a batch of matrices
(``jax.vmap``) one is done after the other: in lockstep, every column would wait for the fullest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from kernels.block_sparse.places import Places, in_a_step, steps_of
from kernels.block_sparse.rule import Products

# Rows of blocks that are done at once. (CPU, T = 2048, 1024 x 4096 at density 1/4: blocks of 128,
# 64 and 32 took 0.37, 0.57 and 0.55 of the dense product's time with 256 rows at once.)
ROWS = 512


def times(x, blocks, places: Places, columns: int) -> jax.Array:
    @sequential_vmap
    def run(x, blocks, places):
        n, bi, bo = blocks.shape
        each = in_a_step(n, columns, bi, ROWS)
        steps = steps_of(places, columns, each)

        def step(s, y):
            ids, at = steps.ids[s], steps.column[s] * bo
            held = jnp.arange(each) < steps.held[s]
            w = jnp.where(held[:, None, None], blocks[ids], 0).reshape(each * bi, bo)
            row = places.rows[ids] * bi
            parts = [lax.dynamic_slice_in_dim(x, row[k], bi, 1) for k in range(each)]
            new = _dot(jnp.concatenate(parts, axis=1), w, x.dtype)
            new += lax.dynamic_slice_in_dim(y, at, bo, 1)
            return lax.dynamic_update_slice_in_dim(y, new, at, 1)

        y = jnp.zeros((x.shape[0], columns * bo), _wide(x.dtype))
        return lax.fori_loop(0, steps.ends[-1], step, y).astype(x.dtype)

    return run(x, blocks, places)


def turned(g, blocks, places: Places, rows: int) -> jax.Array:
    return times(g, blocks.swapaxes(1, 2), places.turned, rows)


def outer(x, g, places: Places, block: tuple[int, int], dtype) -> jax.Array:
    @sequential_vmap
    def run(x, g, places):
        n, (bi, bo) = places.rows.shape[0], block
        columns = g.shape[1] // bo
        each = in_a_step(n, columns, bi, ROWS)
        steps = steps_of(places, columns, each)
        x_t = x.T

        def step(s, found):
            row = places.rows[steps.ids[s]] * bi
            parts = [lax.dynamic_slice_in_dim(x_t, row[k], bi, 0) for k in range(each)]
            some = lax.dynamic_slice_in_dim(g, steps.column[s] * bo, bo, 1)
            new = _dot(jnp.concatenate(parts), some, dtype).astype(dtype).reshape(each, bi, bo)
            # What a step has too many, the next one writes over.
            return lax.dynamic_update_slice_in_dim(found, new, steps.first[s], 0)

        found = jnp.zeros((n + each, bi, bo), dtype)
        found = lax.fori_loop(0, steps.ends[-1], step, found)
        return found[jnp.argsort(places.by_column)]

    return run(x, g, places)


def _dot(a, b, dtype):
    return jnp.dot(a, b, preferred_element_type=_wide(dtype)).astype(_wide(dtype))


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


PRODUCTS = Products(times, turned, outer)
