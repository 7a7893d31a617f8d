"""The matrix product, with a backward pass that suits each backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.platform import platform


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., d_in] times w [d_in, d_out], in x's dtype.

    On CPUs with a backward pass of its own, which cannot be differentiated in forward mode (its
    gradient can). There XLA transposes the left operand of the weight's gradient by a copy, and
    fuses the elementwise work before it into that copy, which then runs several times slower than
    the product: so the smaller operand is put on the left, and kept out of the fusion.
    """
    w = w.astype(x.dtype)
    return _product(x, w) if platform() == "cpu" else jnp.dot(x, w)


def product_gradients(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dx, dw) of ``product(x, w)`` from its cotangent g [..., d_out]; w in x's dtype."""
    if platform() == "cpu":
        return _backward((x, w), g)
    return jax.vjp(jnp.dot, x, w)[1](g)


@jax.custom_vjp
def _product(x, w):
    return jnp.dot(x, w)


def _forward(x, w):
    return jnp.dot(x, w), (x, w)


def _backward(saved, g):
    x, w = saved
    tokens = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())))
    x = jax.lax.optimization_barrier(x)
    if w.shape[0] <= w.shape[1]:
        dw = jax.lax.dot_general(x, g, ((tokens, tokens), ((), ())))
    else:
        g = jax.lax.optimization_barrier(g)
        # Without the barrier XLA turns the product round again.
        dw = jax.lax.dot_general(g, x, ((tokens, tokens), ((), ())))
        dw = jax.lax.optimization_barrier(dw).T
    return dx, dw


_product.defvjp(_forward, _backward)
