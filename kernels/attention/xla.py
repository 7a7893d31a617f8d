"""Attention by plain XLA, long rows a chunk of queries at a time.

Memory is linear in the length: mask, bias and scores exist for one chunk only, and the backward
pass computes them again, chunk by chunk, from the scores' row sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import dense
from kernels.attention.bias import ALiBi, RelativeBias, by_distance, materialize
from kernels.attention.dense import Options
from kernels.attention.dropout import Dropout
from kernels.attention.rule import Consecutive, allowed, first_of, row_indices

# Scores of a head (queries x keys) that are computed at once, and the fewest queries of a chunk.
MOST_SCORES = 1 << 20
LEAST_CHUNK = 128
LOG2E, UNSEEN = math.log2(math.e), 1e30  # of sums, as ``kernel.Kernel`` has them


def attention(q, k, v, *, bias=None, softcap=None, scale, dropout=None, **rule) -> jax.Array:
    """As ``kernels.attention.attention``, with ``scale`` given."""
    queries, keys = q.shape[1], k.shape[1]
    options = Options(scale, softcap)
    chunk = _chunk(queries, keys)
    if chunk < queries:
        static = _Static(options, chunk, rule.pop("causal", False), rule.pop("window", None))
        out: Any = _attend(static, q, k, v, bias, rule, dropout)
        return out
    mask = allowed(queries, keys, **rule)
    if bias is not None:
        bias = _grouped(_array(bias, queries, keys, rule), k.shape[2])
    return dense.attend(options, q, k, v, bias, mask, dropout)


def _chunk(queries: int, keys: int) -> int:
    """Queries of a chunk: all, or equal pieces with next to no padding."""
    if queries * keys <= MOST_SCORES:
        return queries
    most = max(MOST_SCORES // keys, LEAST_CHUNK)
    pieces = -(-queries // most)
    return -(-queries // pieces)


@dataclasses.dataclass(frozen=True)
class _Static:
    options: Options
    chunk: int
    causal: bool
    window: int | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q, k, v, bias, marks, dropout):
    """``marks``: the arrays of the rule, by name."""
    return _forward(static, q, k, v, bias, marks, dropout)[0]


def _forward(static: _Static, q, k, v, bias, marks, dropout):
    spread, pieces = _split_bias(static, bias, q.shape[1])

    def body(_, piece):
        mask, drop = _of_chunk(static, k, marks, dropout, piece)
        this_bias = _bias_of_chunk(static, k, spread, piece.get("bias"), marks, piece)
        out, saved = dense.forward(static.options, piece["q"], k, v, this_bias, mask, drop)
        return None, (out, saved[-1])

    pieces |= _pieces(static, q, marks, dropout)
    _, (outs, sums) = jax.lax.scan(body, None, pieces)
    return _join(outs, q.shape[1]), (q, k, v, bias, marks, dropout, outs, sums)


def _backward(static: _Static, saved, g):
    q, k, v, bias, marks, dropout, outs, sums = saved
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    queries = q.shape[1]
    spread, pieces = _split_bias(static, bias, queries)
    pieces |= _pieces(static, q, marks, dropout)
    pieces |= {"g": _cut(g, static.chunk), "out": outs, "sums": sums}

    def body(carry, piece):
        dk, dv, d_spread = carry

        mask, drop = _of_chunk(static, k, marks, dropout, piece)
        this_bias, pull = jax.vjp(
            lambda spread, part: _bias_of_chunk(static, k, spread, part, marks, piece),
            spread,
            piece.get("bias"),
        )
        kept = (piece["q"], k, v, this_bias, mask, drop, piece["out"], piece["sums"])
        dq, dk_here, dv_here, d_bias = dense.gradients(static.options, kept, piece["g"])
        d_here, d_part = pull(d_bias)
        d_spread = jax.tree.map(jnp.add, d_spread, d_here)
        return (dk + dk_here, dv + dv_here, d_spread), (dq, d_part)

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    carry = (*zeros, jax.tree.map(jnp.zeros_like, spread))
    (dk, dv, d_spread), (dq, d_parts) = jax.lax.scan(body, carry, pieces)
    d_bias = d_spread if d_parts is None else _join(d_parts, queries, axis=-2).reshape(bias.shape)
    dq = _join(dq, queries)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), d_bias, None, None


_attend.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A ``kernel.Kernel``: the same, with the scores' sums for those who merge results."""

    static: _Static

    @property
    def options(self) -> dict[str, Any]:
        names = {name: getattr(self.static, name) for name in ("causal", "window")}
        return names | dataclasses.asdict(self.static.options)

    def forward(self, q, k, v, bias, marks):
        marks, dropout = _apart(marks)
        out, (*_, sums) = _forward(self.static, q, k, v, bias, marks, dropout)
        lse = _join(sums, q.shape[1], axis=-1).reshape(q.shape[0], q.shape[2], -1)
        return out, jnp.where(jnp.isinf(lse), UNSEEN, lse * LOG2E)

    def gradients(self, q, k, v, bias, marks, out, lse, g):
        marks, dropout = _apart(marks)
        (batch, queries, heads, _), groups, chunk = q.shape, k.shape[2], self.static.chunk
        sums = jnp.where(lse >= UNSEEN / 2, jnp.inf, lse / LOG2E)
        sums = sums.reshape(batch, groups, heads // groups, queries)
        sums, outs = _cut(sums, chunk, axis=-1), _cut(out, chunk)
        saved = (q, k, v, bias, marks, dropout, outs, sums)
        return _backward(self.static, saved, g)[:4]


def _apart(marks):
    """(the arrays of the rule, dropout)."""
    return {name: x for name, x in marks.items() if name != "dropout"}, marks["dropout"]


def prepared(q, k, v, *, bias, scale, softcap, causal, window, dropout, **marks):
    """(kernel, q, k, v, bias, marks), as ``tpu.prepared``."""
    options = Options(scale, softcap)
    static = _Static(options, _chunk(q.shape[1], k.shape[1]), causal, window)
    names = ("segments", "kv_segments", "prefix", "positions", "kv_positions")
    marks = {name: marks.get(name) for name in names}
    return Chunks(static), q, k, v, bias, marks | {"dropout": dropout}


def _cut(x, chunk: int, axis: int = 1):
    """Pieces [n, ...] of ``chunk`` along ``axis``, the last filled up with zeros."""
    axis %= x.ndim
    length = x.shape[axis]
    pieces = -(-length // chunk)
    widths = [(0, pieces * chunk - length if a == axis else 0) for a in range(x.ndim)]
    x = jnp.pad(x, widths)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], pieces, chunk, *x.shape[axis + 1 :]), axis, 0)


def _join(pieces, length: int, axis: int = 1):
    """The inverse of ``_cut``."""
    axis %= pieces.ndim - 1
    x = jnp.moveaxis(pieces, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _pieces(static: _Static, q, marks, dropout: Dropout | None) -> dict[str, Any]:
    """What differs from chunk to chunk, but for the bias."""
    pieces = {"q": _cut(q, static.chunk)}
    pieces["n"] = jnp.arange(len(pieces["q"]))
    if marks.get("segments") is not None:
        pieces["segments"] = _cut(marks["segments"], static.chunk)
    if marks.get("positions") is not None:
        rows = row_indices(marks["positions"], q.shape[1])
        pieces["positions"] = _cut(rows, static.chunk)
    if dropout is not None:
        pieces["rows"] = _cut(dropout.rows, static.chunk, axis=2)
    return pieces


def _split_bias(static: _Static, bias, queries: int):
    """(the bias that every chunk takes whole, the pieces of one that is an array of queries)."""
    if isinstance(bias, RelativeBias | ALiBi) or bias is None or bias.ndim < 2:
        return bias, {}
    if bias.shape[-2] == 1 and queries > 1:
        return bias, {}
    return None, {"bias": _cut(bias, static.chunk, axis=-2)}


def _rows_of_chunk(static: _Static, piece):
    first = piece["n"] * static.chunk
    return piece.get("positions", first + jnp.arange(static.chunk, dtype=jnp.int32))


def _of_chunk(static: _Static, k, marks, dropout: Dropout | None, piece):
    """(mask [B or 1, chunk, S] or None, dropout) of one chunk."""
    here = marks | {
        "positions": _rows_of_chunk(static, piece),
        "segments": piece.get("segments"),
    }
    mask = allowed(static.chunk, k.shape[1], causal=static.causal, window=static.window, **here)
    if dropout is not None:
        dropout = dataclasses.replace(dropout, rows=piece["rows"])
    return mask, dropout


def _bias_of_chunk(static: _Static, k, spread, part, marks, piece):
    """The bias of one chunk, [B, K, G, chunk, S] or so: of the whole, or its own ``part``."""
    keys, groups = k.shape[1:3]
    bias = part if spread is None else spread
    if bias is None:
        return None
    first = _first(marks)
    if isinstance(bias, RelativeBias | ALiBi) and first is not None:
        bias = materialize(bias, static.chunk, keys, first + piece["n"] * static.chunk)[None]
    here = marks | {"positions": _rows_of_chunk(static, piece)}
    return _grouped(_array(bias, static.chunk, keys, here), groups)


def _array(bias, queries: int, keys: int, rule) -> jax.Array:
    """The bias, float32, broadcastable to [B, N, T, S]."""
    if not isinstance(bias, RelativeBias | ALiBi):
        return bias.astype(jnp.float32)
    positions, kv_positions = rule.get("positions"), rule.get("kv_positions")
    first = _first(rule)
    if first is not None:
        return materialize(bias, queries, keys, first)[None]
    distance = (
        row_indices(kv_positions, keys)[:, None, :] - row_indices(positions, queries)[:, :, None]
    )
    return jnp.moveaxis(by_distance(bias, distance), 0, 1)


def _first(rule):
    """What the first query is ahead of the first key where both rows go on one by one, else
    None."""
    places = rule.get("positions"), rule.get("kv_positions")
    if all(x is None or isinstance(x, Consecutive) for x in places):
        return first_of(places[0]) - first_of(places[1])
    return None


def _grouped(bias: jax.Array, groups: int) -> jax.Array:
    """[B, N, T, S], broadcastable, as [B, K, G, T, S]."""
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if bias.shape[1] == 1:
        return bias[:, :, None]
    return bias.reshape(bias.shape[0], groups, -1, *bias.shape[2:])
