"""Attention on TPUs by Pallas kernels: layouts, padding, and the rule of differentiation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import blocks, tpu_backward, tpu_forward, tuning
from kernels.attention.bias import ALiBi, RelativeBias, by_distance
from kernels.attention.blocks import Rule
from kernels.attention.rule import row_indices
from kernels.attention.second import derivative_of_gradients
from kernels.attention.tpu_parts import LANES, MASKED, Plan
from kernels.attention.tuning import Sizes

# The backward kernel holds the gradients of all keys and values of a head in VMEM, in float32, and
# their rounded copies; also the bias's tiles, and their gradients', for all heads of a group. Of a
# core's VMEM these shares may go to the one and the other, and so much to all of a kernel.
OF_GRADIENTS, OF_BIAS, OF_KERNEL = 9 / 16, 3 / 16, 25 / 32


def unserved(q, k, v, *, positions, kv_positions, bias, dropout, **_) -> str | None:
    """The argument that these kernels cannot serve, or None; arguments as of ``attention``."""
    vmem = tuning.chip().vmem
    width = sum(-(-x.shape[-1] // LANES) * LANES for x in (k, v))
    refused = {
        "bias (at positions)": bias is not None
        and not (positions is None and kv_positions is None),
        "dropout": dropout is not None,
        "bias (an array)": bias is not None and not isinstance(bias, RelativeBias | ALiBi),
        "bias (of so large a max_distance, of so many heads of a group)": _bias_bytes(
            bias, q.shape[2] // k.shape[2]
        )
        > OF_BIAS * vmem,
        "dtype": q.dtype not in (jnp.float32, jnp.bfloat16) or {k.dtype, v.dtype} != {q.dtype},
        "length of keys": k.shape[1] * width * (4 + 2 * k.dtype.itemsize) > OF_GRADIENTS * vmem,
        "width of heads": max(q.shape[-1], v.shape[-1]) > 256,
    }
    return next((name for name, is_refused in refused.items() if is_refused), None)


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    prefix=None,
    segments=None,
    kv_segments=None,
    positions=None,
    kv_positions=None,
    window=None,
    bias=None,
    softcap=None,
    scale,
    dropout=None,
    sizes: Sizes | None = None,
    interpret: object = False,
) -> jax.Array:
    """As ``kernels.attention.attention``, with ``scale`` given. ``sizes``: None for those that won
    on the chip. ``interpret``: as ``pallas_call`` takes it, to run where there is no TPU.

    Raises NotImplementedError for what ``unserved`` names.
    """
    refused = unserved(
        q, k, v, positions=positions, kv_positions=kv_positions, bias=bias, dropout=dropout
    )
    if refused is not None:
        raise NotImplementedError(f"implementation='pallas_tpu' does not serve this {refused}")
    queries, keys = q.shape[1], k.shape[1]
    if sizes is None:
        sizes = tuning.best_sizes(max(q.shape[-1], v.shape[-1]), bias is not None, queries)

    placed = causal or window is not None
    placed = placed and not (positions is None and kv_positions is None)
    marks = {"segments": segments, "kv_segments": kv_segments, "prefix": prefix}
    for name, x, length in (
        ("positions", positions, queries), ("kv_positions", kv_positions, keys)
    ):  # fmt: skip
        rows = jnp.broadcast_to(row_indices(x, length), (q.shape[0], length))
        marks[name] = rows if placed else None

    def rule(most: int) -> Rule:
        return Rule(
            queries,
            keys,
            *(_block(n, most) for n in (queries, keys)),
            causal=causal,
            window=window,
            segments=segments is not None,
            prefix=prefix is not None,
            positions=placed,
        )

    plan = Plan(
        rule(sizes.forward),
        scale=float(scale),
        softcap=softcap,
        reach=_reach(bias),
        sloped=isinstance(bias, ALiBi),
        chunk=sizes.forward_chunk,
        backward_chunk=sizes.backward_chunk,
        vmem_bytes=int(OF_KERNEL * tuning.chip().vmem),
        interpret=interpret,
    )
    back = dataclasses.replace(plan, rule=rule(sizes.backward))
    results: Any = _attend(plan, back, q, k, v, bias, marks)
    return results[0]


def _block(length: int, most: int) -> int:
    """Blocks of equal size, a multiple of 128, with the least padding that ``most`` allows."""
    tiles = -(-length // LANES)
    return -(-tiles // -(-tiles * LANES // most)) * LANES


def _reach(bias) -> int:
    """How many tiles of the bias there are on each side of the diagonal's; 0 without a bias."""
    if bias is None:
        return 0
    if isinstance(bias, ALiBi):
        return 1
    # From ``reach`` tiles on, every distance of a tile is at least ``max_distance``.
    return -(-(bias.max_distance + LANES - 1) // LANES)


def _bias_bytes(bias, each: int) -> int:
    if not isinstance(bias, RelativeBias | ALiBi):
        return 0
    return each * 2 * (2 * _reach(bias) + 1) * LANES * LANES * 4


def _strips(bias, groups: int):
    """(strip [K, G, tiles + 1, 128], slope [K, G, 1, 1] or None) of a bias, float32."""
    if bias is None:
        return None, None
    half = (_reach(bias) + 1) * LANES
    strip = by_distance(bias, jnp.arange(-half, half))  # [N, 2 * half]
    strip = strip.reshape(groups, -1, 2 * half // LANES, LANES)
    if not isinstance(bias, ALiBi):
        return strip, None
    return strip, -LANES * bias.slopes.astype(jnp.float32).reshape(groups, -1, 1, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan: Plan, back: Plan, q, k, v, bias, marks):
    """The result and the scores' log2 sums [B, K, G, T]; the derivative is that of the result.

    Arguments as of ``attention``; marks: segments, kv_segments, prefix, positions and kv_positions
    by name, each int [B, T or S] or None.
    """
    table, *inputs = _padded(plan.rule, q, k, v, marks)
    out, lse = tpu_forward.forward(plan, table, inputs, *_strips(bias, k.shape[2]))
    queries = plan.rule.queries
    return _merged(out, queries), lse.reshape(*lse.shape[:3], -1)[..., :queries]


def _forward(plan: Plan, back: Plan, q, k, v, bias, marks):
    # By way of the function with its rule, so that this can be differentiated again.
    results: Any = _attend(plan, back, q, k, v, bias, marks)
    return results, (q, k, v, bias, marks, *results)


def _backward(plan: Plan, back: Plan, saved, cotangents):
    gradients: Any = _gradients(plan, back, *saved, cotangents[0])
    return *gradients, None


_attend.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(plan: Plan, back: Plan, q, k, v, bias, marks, out, lse, g):
    """Gradients of q, k, v and bias."""
    rule, groups = back.rule, k.shape[2]
    table, *inputs = _padded(rule, q, k, v, marks)
    out, g = (_split(x, groups, rule.padded_queries) for x in (out, g))
    # Queries of padding have probabilities of zero.
    lse = _pad(lse, 3, rule.padded_queries, -MASKED)
    lse = jnp.reshape(lse, (*lse.shape[:3], rule.query_blocks, 1, rule.block_q))
    strips, pull = jax.vjp(lambda bias: _strips(bias, groups), bias)
    dq, dk, dv, *d_strips = tpu_backward.backward(back, table, inputs, *strips, (out, g, lse))
    (d_bias,) = pull(tuple(d_strips))
    dk, dv = (x[:, :, : rule.keys].swapaxes(1, 2) for x in (dk, dv))
    return _merged(dq, rule.queries), dk, dv, d_bias


def _gradients_forward(plan: Plan, back: Plan, q, k, v, bias, marks, out, lse, g):
    return _gradients(plan, back, q, k, v, bias, marks, out, lse, g), (q, k, v, bias, marks, g)


def _gradients_backward(plan: Plan, back: Plan, saved, cotangents):
    """By XLA. The result and its sums are functions of the rest: all of the derivative goes to
    that."""
    *arguments, marks, g = saved
    options = marks | {"causal": plan.rule.causal, "window": plan.rule.window}
    options |= {"softcap": plan.softcap, "scale": plan.scale}
    *firsts, d_g = derivative_of_gradients(options, arguments, g, cotangents)
    return *firsts, None, None, None, d_g


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _split(x, groups: int, length: int):
    """[B, T, N, H] as [B, K, G, length, H], filled up with zeros."""
    batch, queries, heads, width = x.shape
    x = x.swapaxes(1, 2).reshape(batch, groups, heads // groups, queries, width)
    return _pad(x, 3, length)


def _merged(x, length: int):
    """The inverse of ``_split``."""
    x = x[:, :, :, :length]
    return x.reshape(x.shape[0], -1, *x.shape[3:]).swapaxes(1, 2)


def _pad(x, axis: int, length: int, value: float = 0) -> Any:
    if x is None or x.shape[axis] == length:
        return x
    widths = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


def _padded(rule: Rule, q, k, v, marks) -> list:
    """[table, q, k, v, q_ids, k_ids, prefix, q_places, k_places] as the kernels take them, of whole
    blocks."""
    marks = {name: x if x is None else x.astype(jnp.int32) for name, x in marks.items()}
    segments = _pad(marks["segments"], 1, rule.padded_queries)
    kv_segments = _pad(marks["kv_segments"], 1, rule.padded_keys)
    prefix = _pad(marks["prefix"], 1, rule.padded_keys)
    # What is padding stands where the last one stands, so that no block reaches further for it.
    places = [
        x if x is None else jnp.pad(x, ((0, 0), (0, to - x.shape[1])), mode="edge")
        for x, to in (
            (marks["positions"], rule.padded_queries),
            (marks["kv_positions"], rule.padded_keys),
        )
    ]
    table = jnp.asarray(blocks.table(rule, segments, kv_segments, prefix, *places))
    # A query of padding matches no key, one of padding neither.
    q_ids = None if segments is None else jnp.where(segments == 0, -1, segments)
    rows = (None if x is None else x[:, None] for x in (q_ids, kv_segments, prefix, *places))
    q = _split(q, k.shape[2], rule.padded_queries)
    k, v = (_pad(x.swapaxes(1, 2), 2, rule.padded_keys) for x in (k, v))
    return [table, q, k, v, *rows]
