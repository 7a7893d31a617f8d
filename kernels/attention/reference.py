"""Attention with everything materialised, in the precision of its arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.attention.bias import ALiBi, RelativeBias, by_distance
from kernels.attention.dropout import kept_of
from kernels.attention.rule import allowed, row_indices


def attention(q, k, v, *, bias=None, softcap=None, scale, dropout=None, **rule) -> jax.Array:
    """As ``kernels.attention.attention``, with ``scale`` given. float64 stays float64."""
    queries, heads, keys = q.shape[1], q.shape[2], k.shape[1]
    group = heads // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest", preferred_element_type=dtype)
    scores = scores.astype(dtype) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if isinstance(bias, RelativeBias | ALiBi):
        query = row_indices(rule.get("positions"), queries)[:, :, None]
        key = row_indices(rule.get("kv_positions"), keys)[:, None, :]
        bias = jnp.moveaxis(by_distance(bias, key - query), 0, 1)
    if bias is not None:
        scores = scores + bias.astype(dtype)
    mask = allowed(queries, keys, **rule)
    if mask is None:
        mask = jnp.ones((1, 1, 1), bool)
    mask = jnp.broadcast_to(mask[:, None], scores.shape)
    peak = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(peak == -jnp.inf, 0, peak)), 0)
    total = weights.sum(-1, keepdims=True)
    probabilities = weights / jnp.where(total == 0, 1, total)
    if dropout is not None:
        kept = kept_of(dropout)
        probabilities = jnp.where(kept, probabilities / (1 - dropout.rate), 0)
    out = jnp.einsum("BNTS,BSNH->BTNH", probabilities, v.astype(dtype), precision="highest")
    return out.astype(q.dtype)
