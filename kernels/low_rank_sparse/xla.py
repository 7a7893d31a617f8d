"""The matrix formed when it is needed, in the forward and again in the backward pass.

Its gradient is formed too, and the factors' and the values' are read off it: with T tokens, rank R
and a square matrix of side d the whole costs 6 T d^2 + 8 R d^2 operations where a dense one costs
6 T d^2: 1 + 4 R / (3 T) times as many. Getting the factors' gradients from products of the tokens
with the factors instead would cost more from T > d / 2 on. (In a program whose layers are not
scanned, XLA for CPUs, which drops barriers early, forms the matrix once and keeps it.)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels.low_rank_sparse.support import gather, plus
from kernels.product import product_gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def low_rank_sparse(x, a, b, values, indices, scale: float, group: int | None) -> jax.Array:
    """See ``kernels.low_rank_sparse.low_rank_sparse``."""
    return jnp.dot(x, materialise(a, b, values, indices, scale, group, x.dtype))


def materialise(a, b, values, indices, scale: float, group: int | None, dtype) -> jax.Array:
    """scale a b + S, in ``dtype``."""
    low = jnp.dot(a.astype(dtype) * jnp.asarray(scale, dtype), b.astype(dtype))
    return plus(low, values.astype(dtype), indices, group)


def _forward(x, a, b, values, indices, scale, group):
    y = low_rank_sparse(x, a, b, values, indices, scale, group)
    return y, (x, a, b, values, indices)


def _backward(scale, group, saved, g):
    x, a, b, values, indices = saved
    # Formed from what is at hand now: without the barrier XLA would keep the forward pass's.
    a_now, b_now, values_now, g = jax.lax.optimization_barrier((a, b, values, g))
    formed = materialise(a_now, b_now, values_now, indices, scale, group, x.dtype)
    dx, _ = product_gradients(x, formed, g)
    # The matrix is gone before its gradient is there.
    dx, x, g = jax.lax.optimization_barrier((dx, x, g))
    _, dw = product_gradients(x, formed, g)
    scaled = jnp.asarray(scale, dw.dtype)
    da = scaled * jnp.dot(dw, b.astype(dw.dtype).T)
    db = jnp.dot(a.astype(dw.dtype).T * scaled, dw)
    dvalues = gather(dw, indices, group)
    return dx, da.astype(a.dtype), db.astype(b.dtype), dvalues.astype(values.dtype), None


low_rank_sparse.defvjp(_forward, _backward)
