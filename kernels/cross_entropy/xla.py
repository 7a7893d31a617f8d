"""Chunked over the positions of a row, with the gradients made in the forward pass.

The loss is the end of the program: the cotangent of its total is one scalar, so d(total)/dx and
d(total)/dW can be made while a chunk's logits are at hand, and the backward pass only scales
them. Logits are computed once, never kept, never recomputed.

Chunks cut T and not B: each holds a share of every row, so a batch that is cut over devices
stays cut. Where it is, every device sums up its own dW, and they are added once, at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.cross_entropy.base import CrossEntropy, Options


def cross_entropy(
    x_BTD: jax.Array,
    w_DV: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    options: Options,
    chunk: int,
    row_shards: int,
    step: Callable | None = None,
) -> CrossEntropy:
    """See ``kernels.cross_entropy.cross_entropy``. ``step``: does one chunk, as ``one_chunk``, the
    default."""
    plan = Plan(options, chunk, row_shards, step or one_chunk)
    return _loss(x_BTD, w_DV, bias_V, weights_BT, targets_BT, plan)


class Plan(NamedTuple):
    """What is known when the program is traced."""

    options: Options
    chunk: int
    shards: int
    step: Callable


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _loss(x, w, bias, weights, targets, plan):
    return _run(x, w, bias, weights, targets, plan, with_gradient=False)[0]


def _forward(x, w, bias, weights, targets, plan):
    return _run(x, w, bias, weights, targets, plan, with_gradient=True)


def _backward(plan, gradients, cotangents):
    scale = cotangents.total
    return (*jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients), None)


_loss.defvjp(_forward, _backward)


def _run(
    x_BTD, w_DV, bias_V, weights_BT, targets_BT, plan: Plan, *, with_gradient
) -> tuple[CrossEntropy, Any]:
    """The result, and (dx, dw, dbias, dweights) or None."""
    shards = plan.shards
    B, T = targets_BT.shape
    C = min(plan.chunk, T)
    chunks = -(-T // C)
    rows = (shards, B // shards)

    def cut(a):
        """[B, T, ...] to [chunks, S, B / S * C, ...], padded at the end (with weight 0)."""
        a = jnp.pad(a, ((0, 0), (0, chunks * C - T)) + ((0, 0),) * (a.ndim - 2))
        a = jnp.moveaxis(a.reshape(*rows, chunks, C, *a.shape[2:]), 2, 0)
        return a.reshape(chunks, shards, rows[1] * C, *a.shape[4:])

    def uncut(a):
        a = a.reshape(chunks, *rows, C, *a.shape[3:])
        return jnp.moveaxis(a, 0, 2).reshape(B, chunks * C, *a.shape[4:])[:, :T]

    step = functools.partial(
        plan.step, w_DV.astype(x_BTD.dtype), bias_V, plan.options, with_gradient
    )
    sums: tuple[Any, ...] = (None, None)
    if with_gradient:
        # What nothing is added to is rounded as it is made: no float32 copy of dW.
        once = chunks == shards == 1 and w_DV.dtype == x_BTD.dtype
        dtype = w_DV.dtype if once else jnp.float32
        dbias = None if bias_V is None else jnp.zeros((shards, *bias_V.shape), jnp.float32)
        sums = (jnp.zeros((shards, *w_DV.shape), dtype), dbias)
    data = jax.tree.map(cut, (x_BTD, targets_BT, weights_BT.astype(jnp.float32)))
    if chunks == 1:
        sums, tokens = step(sums, jax.tree.map(lambda a: a[0], data))
        tokens = jax.tree.map(lambda a: a[None], tokens)
    else:
        sums, tokens = jax.lax.scan(step, sums, data)
    full_BT, loss_BT, lse_BT, correct_BT, dx_BTD = jax.tree.map(uncut, tokens)
    total = jnp.sum(weights_BT.astype(jnp.float32) * full_BT)
    result = CrossEntropy(total, loss_BT, lse_BT, correct_BT)
    if not with_gradient:
        return result, None
    dw, dbias = jax.tree.map(lambda a: a.sum(0), sums)
    if bias_V is not None:
        dbias = dbias.astype(bias_V.dtype)
    return result, (dx_BTD, dw.astype(w_DV.dtype), dbias, full_BT.astype(weights_BT.dtype))


def one_chunk(w_DV, bias_V, options: Options, with_gradient: bool, sums, data):
    """One chunk: x [S, N, D], targets and weights [S, N], for S shards of N tokens each; to
    ``sums`` (dW [S, D, V], dbias [S, V] or None, both float32) it adds its own.

    Returns the sums and (smoothed loss with z-loss, loss, lse, correct, dx) of the tokens.

    The gradient of the logits is scale * (p (1 + 2 z lse) - (1 - smoothing) hot - smoothing / V),
    made from the one array of exponentials that the sum was made from.
    """
    x_SND, targets_SN, weights_SN = data
    smoothing, z = options.label_smoothing, options.z_loss
    V = options.vocabulary or w_DV.shape[1]
    columns = jax.lax.broadcasted_iota(targets_SN.dtype, (1, 1, w_DV.shape[1]), 2)
    padded = w_DV.shape[1] > V
    logits_SNV = _einsum("snd,dv->snv", x_SND, w_DV)
    if options.logit_scale != 1:
        logits_SNV = logits_SNV * options.logit_scale
    if bias_V is not None:
        logits_SNV = logits_SNV + bias_V.astype(jnp.float32)
    if options.softcap is not None:
        logits_SNV = options.softcap * jnp.tanh(logits_SNV / options.softcap)
    if padded:
        logits_SNV = jnp.where(columns < V, logits_SNV, -jnp.inf)
    top_SN = logits_SNV.max(-1)
    exp_SNV = jnp.exp(logits_SNV - top_SN[..., None])
    norm_SN = exp_SNV.sum(-1)
    lse_SN = top_SN + jnp.log(norm_SN)
    target_SN = jnp.take_along_axis(logits_SNV, targets_SN[..., None], axis=-1)[..., 0]
    loss_SN = lse_SN - target_SN
    full_SN = loss_SN + z * lse_SN**2
    if smoothing:
        mean_SN = jnp.where(columns < V, logits_SNV, 0).sum(-1) / V
        full_SN = full_SN + smoothing * (target_SN - mean_SN)
    tokens = (full_SN, loss_SN, lse_SN, target_SN >= top_SN)
    if not with_gradient:
        return sums, (*tokens, None)

    scale_SN = weights_SN * (1 + 2 * z * lse_SN) / norm_SN
    down_SN = weights_SN * (1 - smoothing)
    hot_SNV = targets_SN[..., None] == columns
    g_SNV = exp_SNV * scale_SN[..., None] - jnp.where(hot_SNV, down_SN[..., None], 0)
    if smoothing:
        g_SNV = g_SNV - (weights_SN * (smoothing / V))[..., None]
    if options.softcap is not None:
        g_SNV = g_SNV * (1 - jnp.square(logits_SNV / options.softcap))
    if padded:
        g_SNV = jnp.where(columns < V, g_SNV, 0)
    dw_SDV, dbias_SV = sums
    if dbias_SV is not None:
        dbias_SV = dbias_SV + g_SNV.sum(1)
    if options.logit_scale != 1:
        g_SNV = g_SNV * options.logit_scale
    g_SNV = g_SNV.astype(x_SND.dtype)
    dx_SND = _einsum("snv,dv->snd", g_SNV, w_DV).astype(x_SND.dtype)
    dw_SDV = dw_SDV + _einsum("snd,snv->sdv", x_SND, g_SNV, dw_SDV.dtype)
    return (dw_SDV, dbias_SV), (*tokens, dx_SND)


def _einsum(axes, a, b, dtype=jnp.float32):
    return jnp.einsum(axes, a, b, preferred_element_type=dtype)
