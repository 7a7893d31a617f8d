"""Attention on TPUs by Pallas kernels: layouts and padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import blocks, kernel, tpu_backward, tpu_forward, tuning
from kernels.attention.bias import ALiBi, RelativeBias, by_distance
from kernels.attention.blocks import Rule
from kernels.attention.kernel import pad
from kernels.attention.rule import Consecutive, first_of, row_indices
from kernels.attention.tpu_parts import LANES, MASKED, Plan
from kernels.attention.tuning import Sizes

# The backward kernel holds the gradients of all keys and values of a head in VMEM, in float32, and
# their rounded copies; also the bias's tiles, and their gradients', for all heads of a group. Of a
# core's VMEM these shares may go to the one and the other, and so much to all of a kernel.
OF_GRADIENTS, OF_BIAS, OF_KERNEL = 9 / 16, 3 / 16, 25 / 32


def unserved(q, k, v, *, positions, kv_positions, bias, **_) -> str | None:
    """The argument that these kernels cannot serve, or None; arguments as of ``attention``."""
    vmem = tuning.chip().vmem
    width = sum(-(-x.shape[-1] // LANES) * LANES for x in (k, v))
    refused = {
        "bias (at positions)": bias is not None
        and not (_whole_tiles(positions) and _whole_tiles(kv_positions)),
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


def _whole_tiles(positions) -> bool:
    """Whether they begin at a multiple of a tile, from where they go on one by one."""
    if isinstance(positions, Consecutive):
        return positions.multiple % LANES == 0
    return positions is None


def attention(q, k, v, *, bias=None, **arguments) -> jax.Array:
    """As ``kernels.attention.attention``, with ``scale`` given. ``sizes``: None for those that won
    on the chip. ``interpret``: as ``pallas_call`` takes it, to run where there is no TPU.

    Raises NotImplementedError for what ``unserved`` names.
    """
    results: Any = kernel.attend(*prepared(q, k, v, bias=bias, **arguments))
    return results[0]


def prepared(
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
):
    """(kernel, q, k, v, bias, marks): what ``kernel.attend`` takes. Arguments as of
    ``attention``."""
    refused = unserved(q, k, v, positions=positions, kv_positions=kv_positions, bias=bias)
    if refused is not None:
        raise NotImplementedError(f"implementation='pallas_tpu' does not serve this {refused}")
    queries, keys = q.shape[1], k.shape[1]
    if sizes is None:
        sizes = tuning.best_sizes(max(q.shape[-1], v.shape[-1]), bias is not None, queries)
    placed = causal or window is not None or bias is not None
    placed = placed and not (positions is None and kv_positions is None)

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
        rate=None if dropout is None else dropout.rate,
        chunk=sizes.forward_chunk,
        backward_chunk=sizes.backward_chunk,
        vmem_bytes=int(OF_KERNEL * tuning.chip().vmem),
        interpret=interpret,
    )
    marks = {
        "segments": segments,
        "kv_segments": kv_segments,
        "prefix": prefix,
        "positions": positions,
        "kv_positions": kv_positions,
        "dropout": dropout,
    }
    back = dataclasses.replace(plan, rule=rule(sizes.backward))
    return Plans(plan, back), q, k, v, bias, marks


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


@dataclasses.dataclass(frozen=True)
class Plans:
    """Of the two kernels."""

    plan: Plan
    back: Plan

    @property
    def options(self) -> dict[str, Any]:
        return kernel.options(self.plan)

    def forward(self, q, k, v, bias, marks):
        """See ``kernel.Kernel``."""
        plan = self.plan
        table, *inputs = _padded(plan, q, k, v, bias, marks)
        out, lse = tpu_forward.forward(plan, table, inputs, *_strips(bias, k.shape[2]))
        queries = plan.rule.queries
        lse = lse.reshape(q.shape[0], q.shape[2], -1)[..., :queries]
        return _merged(out, queries), lse

    def gradients(self, q, k, v, bias, marks, out, lse, g):
        """See ``kernel.Kernel``."""
        rule, groups = self.back.rule, k.shape[2]
        table, *inputs = _padded(self.back, q, k, v, bias, marks)
        out, g = (_split(x, groups, rule.padded_queries) for x in (out, g))
        # Queries of padding have probabilities of zero.
        lse = _in_blocks(lse, groups, rule.padded_queries, rule.block_q, -MASKED)
        strips, pull = jax.vjp(lambda bias: _strips(bias, groups), bias)
        results = (out, g, lse)
        dq, dk, dv, *d_strips = tpu_backward.backward(self.back, table, inputs, *strips, results)
        (d_bias,) = pull(tuple(d_strips))
        dk, dv = (x[:, :, : rule.keys].swapaxes(1, 2) for x in (dk, dv))
        return _merged(dq, rule.queries), dk, dv, d_bias


def _in_blocks(x, groups: int, length: int, block: int, value: float = 0):
    """[B, N, T] as [B, K, G, blocks, 1, block]."""
    batch, heads, _ = x.shape
    x = pad(x, 2, length, value)
    return x.reshape(batch, groups, heads // groups, length // block, 1, block)


def _split(x, groups: int, length: int):
    """[B, T, N, H] as [B, K, G, length, H], filled up with zeros."""
    batch, queries, heads, width = x.shape
    x = x.swapaxes(1, 2).reshape(batch, groups, heads // groups, queries, width)
    return pad(x, 3, length)


def _merged(x, length: int):
    """The inverse of ``_split``."""
    x = x[:, :, :, :length]
    return x.reshape(x.shape[0], -1, *x.shape[3:]).swapaxes(1, 2)


def _padded(plan: Plan, q, k, v, bias, marks) -> list:
    """[table, q, k, v, q_ids, k_ids, prefix, q_places, k_places, shift, q_drop, k_drop] as the
    kernels take them, of whole blocks."""
    rule, groups = plan.rule, k.shape[2]
    lengths = rule.padded_queries, rule.padded_keys
    ids = {name: marks[name] for name in ("segments", "kv_segments", "prefix")}
    ids = {name: x if x is None else x.astype(jnp.int32) for name, x in ids.items()}
    segments = pad(ids["segments"], 1, lengths[0])
    kv_segments = pad(ids["kv_segments"], 1, lengths[1])
    prefix = pad(ids["prefix"], 1, lengths[1])
    places, shift = [None, None], None
    if rule.positions:
        given = marks["positions"], marks["kv_positions"]
        sizes = (rule.queries, rule.keys)
        rows = [row_indices(x, n).astype(jnp.int32) for x, n in zip(given, sizes, strict=True)]
        rows = [jnp.broadcast_to(x, (q.shape[0], x.shape[1])) for x in rows]
        # What is padding stands where the last one stands, so that no block reaches further for it.
        places = [
            jnp.pad(x, ((0, 0), (0, to - x.shape[1])), mode="edge")
            for x, to in zip(rows, lengths, strict=True)
        ]
        if bias is not None:
            first, kv_first = (jnp.asarray(first_of(x), jnp.int32) for x in given)
            shift = (first - kv_first).reshape(1, 1)
    table = jnp.asarray(blocks.table(rule, segments, kv_segments, prefix, *places))
    # A query of padding matches no key, one of padding neither.
    q_ids = None if segments is None else jnp.where(segments == 0, -1, segments)
    drops = [None, None]
    if plan.rate is not None:
        dropped = marks["dropout"]
        drops = [
            _in_blocks(dropped.rows, groups, lengths[0], rule.block_q),
            _in_blocks(dropped.columns, groups, lengths[1], rule.block_k),
        ]
    rows = (None if x is None else x[:, None] for x in (q_ids, kv_segments, prefix, *places))
    q = _split(q, groups, lengths[0])
    k, v = (pad(x.swapaxes(1, 2), 2, lengths[1]) for x in (k, v))
    return [table, q, k, v, *rows, shift, *drops]
