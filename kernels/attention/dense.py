"""Attention by plain XLA over all queries at once: float32 scores and softmax, grouped heads
without repeated keys.

The backward pass is written out. It keeps the scores' row sums instead of the probabilities,
and orders its products so that a [T, S] array is never the operand that XLA has to transpose:
on CPUs a transposed copy with the elementwise work fused into it costs several times the product.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels.attention.dropout import Dropout, kept_of

_MASKED = -1e30  # finite, so that a row with nothing to attend has finite gradients
_DOT = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
_BATCH = ((0, 1), (0, 1))  # the leading axes [B, K] of both operands


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known of the scores when the program is traced."""

    scale: float
    softcap: float | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(options: Options, q, k, v, bias, mask, dropout):
    """q [B, T, N, H], k and v [B, S, K, H], bias [B, K, G, T, S] or so, mask [B, T, S] or so,
    dropout a ``Dropout`` or None."""
    return forward(options, q, k, v, bias, mask, dropout)[0]


def forward(options: Options, q, k, v, bias, mask, dropout):
    """(result, what the gradients need), arguments as of ``attend``."""
    batch, queries, heads, _ = q.shape
    scores, _ = _scores(options, q, k, bias, mask)
    peak = scores.max(-1)
    weights = jnp.exp(scores - peak[..., None])
    total = weights.sum(-1)
    seen = peak > _MASKED / 2
    if dropout is not None:
        weights = _drop(weights, dropout)
    out = _DOT(_rows(weights).astype(v.dtype), _heads(v), (((3,), (2,)), _BATCH))
    out = out.reshape(*total.shape, -1) * jnp.where(seen, 1 / total, 0)[..., None]
    out = out.astype(q.dtype).reshape(batch, heads, queries, -1).swapaxes(1, 2)
    # A row that sees nothing gets an infinite sum, and so probabilities of zero.
    log_total = jnp.where(seen, peak + jnp.log(total), jnp.inf)
    return out, (q, k, v, bias, mask, dropout, out, log_total)


def _backward(options: Options, saved, g):
    dq, dk, dv, d_bias = gradients(options, saved, g)
    _, k, v, *_ = saved
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), d_bias, None, None


def gradients(options: Options, saved, g):
    """Gradients of q, k, v and bias; those of k and v in float32."""
    q, k, v, bias, mask, dropout, out, log_total = saved
    q, k, v = (jnp.asarray(x) for x in (q, k, v))  # JAX 0.7 saves constants as literals
    queries, groups = q.shape[1], k.shape[2]
    scores, slope = _scores(options, q, k, bias, mask)
    p = jnp.exp(scores - log_total[..., None])
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # [B, T, N]
    delta = delta.swapaxes(1, 2).reshape(*log_total.shape, 1)
    g_rows = _queries(g, groups)
    dp = _DOT(g_rows, _heads(v), (((3,), (3,)), _BATCH)).reshape(p.shape)
    dropped = p
    if dropout is not None:
        dropped, dp = (_drop(x, dropout) for x in (p, dp))
    ds = p * (dp - delta)
    d_bias = None if bias is None else _sum_to(ds, bias)
    ds = _rows(ds if slope is None else ds * slope).astype(q.dtype)
    # [H, T] x [T, S] rather than [S, T] x [T, H]: the small operand is the one transposed.
    dv = _DOT(g_rows, _rows(dropped).astype(g.dtype), (((2,), (2,)), _BATCH))
    dk = _DOT(_queries(q, groups), ds, (((2,), (2,)), _BATCH)) * options.scale
    dq = _DOT(ds, _heads(k), (((3,), (2,)), _BATCH)) * options.scale
    dq = dq.reshape(q.shape[0], q.shape[2], queries, -1).swapaxes(1, 2)
    dk, dv = (x.transpose(0, 3, 1, 2) for x in (dk, dv))
    return dq.astype(q.dtype), dk, dv, d_bias


attend.defvjp(forward, _backward)


def _scores(options: Options, q, k, bias, mask):
    """Scores [B, K, G, T, S], float32, and the derivative of the cap on them (or None)."""
    (batch, queries, heads, _), groups = q.shape, k.shape[2]
    q = (q * options.scale).astype(q.dtype)
    scores = _DOT(_queries(q, groups), _heads(k), (((3,), (3,)), _BATCH))
    scores = scores.reshape(batch, groups, heads // groups, queries, -1)
    slope = None
    if options.softcap is not None:
        bounded = jnp.tanh(scores / options.softcap)
        scores, slope = options.softcap * bounded, 1 - jnp.square(bounded)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, _MASKED)
    return scores, slope


def _heads(x):
    """[B, S, K, H] as [B, K, S, H]."""
    return x.swapaxes(1, 2)


def _queries(q, groups: int):
    """[B, T, N, H] as [B, K, G * T, H]."""
    batch, queries, heads, width = q.shape
    return _heads(q).reshape(batch, groups, heads // groups * queries, width)


def _rows(x):
    """[B, K, G, T, S] as [B, K, G * T, S]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _drop(x, dropout: Dropout):
    """Dropout of [B, K, G, T, S]."""
    kept = kept_of(dropout).reshape(x.shape)
    return jnp.where(kept, x / (1 - dropout.rate), 0)


def _sum_to(x, like):
    """``x`` summed over the axes along which ``like`` was broadcast."""
    if like.shape[0] == 1:
        # As a product: XLA's own sum over a leading axis takes 60 times as long on CPUs.
        ones = jnp.ones((1, x.shape[0]), x.dtype)
        x = jnp.tensordot(ones, x, 1, precision=jax.lax.Precision.HIGHEST)
    axes = tuple(i for i, n in enumerate(like.shape) if n == 1 and x.shape[i] > 1)
    return x.sum(axes, keepdims=True).astype(like.dtype)
