"""The forward kernel for TPUs: online softmax over the pairs of blocks that the rule leaves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import dropout
from kernels.attention import tpu_parts as parts
from kernels.attention.blocks import DIAGONAL, EMPTY, word_at
from kernels.attention.tpu_parts import LANES, LOG2E, MASKED, NT, Plan


def kernel(plan: Plan, names, *refs):
    """One pair of blocks of one head. ``names`` says which of the optional refs there are.

    m: the greatest score of each query so far, in every lane. l: the sum of its weights, spread
    over the lanes (lane c holds the keys c mod 128). acc: the sum of weighted values.
    """
    ref = dict(zip(names, refs, strict=True))
    rule, acc, m, l = plan.rule, ref["acc"], ref["m"], ref["l"]
    b, g, p = (pl.program_id(axis) for axis in (1, 2, 3))
    word = word_at(ref["table"], b, p)
    i, j, kind = parts.fields(word)
    offset = parts.offset(plan, ref)
    undropped = 1.0 if plan.rate is None else 1 - plan.rate

    first = word & 1 == 1

    @pl.when(kind == EMPTY)
    def _():
        m[...] = jnp.full_like(m, MASKED)
        l[...] = jnp.zeros_like(l)
        acc[...] = jnp.zeros_like(acc)

    if rule.segments:

        @pl.when(first)
        def _():
            ref["ids"][...] = parts.across(ref["q_ids"][0])

    if rule.positions:

        @pl.when(first)
        def _():
            ref["places"][...] = parts.across(ref["q_places"][0])

    if plan.rate is not None:

        @pl.when(first)
        def _():
            ref["drops"][...] = parts.across(ref["q_drop"][0, 0, 0, 0])

    if plan.reach:

        @pl.when((b == 0) & (p == 0))
        def _():
            parts.lay_tiles(ref["strip"].at[0, 0], ref["tiles"].at[g], plan)

    def scores(kind, begin, end):
        keys = parts.keys_seen(rule, kind, end)
        q, k = ref["q"][0, 0, 0, begin:end], ref["k"][0, 0, :keys]
        return parts.dot(q, k, NT)

    def finish(kind, begin, end, s):
        keys = s.shape[1]
        s = _bounded(plan, s)
        if plan.reach:
            diagonal = (j * rule.block_k - i * rule.block_q - offset - begin) >> 7
            far = _far(plan, ref)
            s = s + parts.block_bias(plan, ref["tiles"].at[g], far, s.shape, diagonal)
        s = _masked(plan, kind, ref, s, begin, (i, j))
        # The first block of a row starts afresh. A select costs less than filling the arrays.
        rows = slice(begin, end)
        m_before, l_before, acc_before = (
            jnp.where(first, start, x[rows]) for x, start in ((m, MASKED), (l, 0.0), (acc, 0.0))
        )
        m_after = jnp.maximum(m_before, jnp.max(s, axis=1, keepdims=True))
        weights = jnp.exp2(s - parts.tile_lanes(m_after, keys))
        kept = jnp.exp2(m_before - m_after)
        total = weights[:, :LANES]
        for at in range(LANES, keys, LANES):
            total = total + weights[:, at : at + LANES]
        m[rows] = m_after
        l[rows] = l_before * kept + total
        v = ref["v"][0, 0, :keys]
        if plan.rate is not None:
            drops = parts.tile_lanes(ref["drops"][rows], keys)
            keep = dropout.kept(plan.rate, drops, ref["k_drop"][0, 0, 0, 0][:, :keys])
            weights = jnp.where(keep, weights, 0.0)
        new = parts.dot(weights.astype(v.dtype), v)
        acc[rows] = acc_before * _width(kept, new.shape[1]) + new

    def body(kind):
        chunks = parts.in_chunks(rule.block_q, plan.chunk)
        # The next chunk's product comes before this one's softmax, so that the two overlap.
        ahead = scores(kind, *chunks[0])
        for n, chunk in enumerate(chunks):
            s = ahead
            if n + 1 < len(chunks):
                ahead = scores(kind, *chunks[n + 1])
            finish(kind, *chunk, s)

    parts.kinds_of(rule, kind, body)

    @pl.when(word & 2 == 2)
    def _():
        total = jnp.broadcast_to(jnp.sum(l[...], axis=1, keepdims=True), m.shape)
        inverse, log = 1 / (undropped * total), m[...] + jnp.log2(total)
        if rule.lonely:
            seen = m[...] > MASKED / 2
            # A query that sees nothing gets an infinite sum: probabilities of zero.
            inverse, log = jnp.where(seen, inverse, 0), jnp.where(seen, log, -MASKED)
        ref["o"][0, 0, 0] = (acc[...] * _width(inverse, acc.shape[1])).astype(ref["o"].dtype)
        ref["lse"][0, 0, 0, 0] = log.T[:1]


def _bounded(plan: Plan, s):
    """Scores in units of log2, soft-capped."""
    if plan.softcap is None:
        return s * (plan.scale * LOG2E)
    return jnp.tanh(s * (plan.scale / plan.softcap)) * (plan.softcap * LOG2E)


def _far(plan: Plan, ref):
    return ref["far"][0, 0, 0, 0] * LOG2E if plan.sloped else None


def _masked(plan: Plan, kind, ref, s, begin, pair):
    """Scores of queries from ``begin`` on, with what the rule forbids masked."""
    rule, (rows, keys) = plan.rule, s.shape

    def mask(s, at):
        start = (begin, at)  # in a diagonal block both count from the same index
        if kind != DIAGONAL:
            i, j = pair
            start = (i * rule.block_q + rule.offset + begin, j * rule.block_k + at)
        ids = None
        if rule.segments:
            q_ids = parts.tile_lanes(ref["ids"][begin : begin + rows], s.shape[1])
            ids = (q_ids, ref["k_ids"][0, :, at : at + s.shape[1]])
        places = None
        if rule.positions:
            q_places = parts.tile_lanes(ref["places"][begin : begin + rows], s.shape[1])
            places = (q_places, ref["k_places"][0, :, at : at + s.shape[1]])
        prefix = ref["prefix"][0, :, at : at + s.shape[1]] if rule.prefix else None
        if kind == DIAGONAL:
            prefix = None  # a diagonal block has none
        seen = parts.mask_of(rule, kind, s.shape, start, 0, ids, prefix, places)
        return s if seen is None else jnp.where(seen, s, MASKED)

    plain = kind == DIAGONAL and not rule.segments and rule.window is None
    before = keys - rows
    if plain and before > 0:  # only the last square holds what comes after
        return jnp.concatenate([s[:, :before], mask(s[:, before:], before)], axis=1)
    return mask(s, 0)


def _width(x, width: int):
    """[n, 128], the same in every lane, as [n, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def forward(plan: Plan, table, inputs, strip, far):
    """``inputs``: q [B, K, G, T, H], k [B, K, S, H], v [B, K, S, H_v], of whole blocks, q_ids
    [B, 1, T], k_ids and prefix [B, 1, S], q_places [B, 1, T] and k_places [B, 1, S], shift [1, 1]
    of the former's first from the latter's, q_drop and k_drop [B, K, G, blocks, 1, block], or None;
    strip [K, G, tiles + 1, 128] and far [K, G, 1, 1] or None.

    Returns the result [B, K, G, T, H_v] and the scores' log2 sums [B, K, G, blocks, 1, block_q].
    """
    q, k, v, q_ids, k_ids, prefix, q_places, k_places, shift, q_drop, k_drop = inputs
    (batch, groups, each, queries, width), wide = q.shape, v.shape[-1]
    rule = plan.rule
    bq, bk = rule.block_q, rule.block_k

    def i(table, b, p):
        return parts.fields(word_at(table, b, p))[0]

    def j(table, b, p):
        return parts.fields(word_at(table, b, p))[1]

    by_query = lambda k, b, g, p, t: (b, k, g, i(t, b, p), 0)  # noqa: E731
    by_key = lambda k, b, g, p, t: (b, k, j(t, b, p), 0)  # noqa: E731
    keys_row = pl.BlockSpec((1, 1, bk), lambda k, b, g, p, t: (b, 0, j(t, b, p)))
    query_row = pl.BlockSpec((1, 1, bq), lambda k, b, g, p, t: (b, 0, i(t, b, p)))
    head = lambda k, b, g, p, t: (k, g, 0, 0)  # noqa: E731
    f32 = jnp.float32
    lse, drop = (1, 1, 1, 1, 1, bq), (1, 1, 1, 1, 1, bk)
    inputs = [
        ("q", q, pl.BlockSpec((1, 1, 1, bq, width), by_query)),
        ("k", k, pl.BlockSpec((1, 1, bk, width), by_key)),
        ("v", v, pl.BlockSpec((1, 1, bk, wide), by_key)),
        ("q_ids", q_ids, query_row),
        ("k_ids", k_ids, keys_row),
        ("prefix", prefix, keys_row),
        ("q_places", q_places, query_row),
        ("k_places", k_places, keys_row),
        ("shift", shift, pl.BlockSpec((1, 1), lambda *_: (0, 0), memory_space=pltpu.SMEM)),
        ("q_drop", q_drop, pl.BlockSpec(lse, lambda k, b, g, p, t: (b, k, g, i(t, b, p), 0, 0))),
        ("k_drop", k_drop, pl.BlockSpec(drop, lambda k, b, g, p, t: (b, k, g, j(t, b, p), 0, 0))),
        ("strip", strip, pl.BlockSpec((1, 1, plan.tiles + 1, LANES), head)),
        ("far", far, pl.BlockSpec((1, 1, 1, 1), head, memory_space=pltpu.SMEM)),
    ]
    inputs = [x for x in inputs if x[1] is not None]
    scratch = {
        "acc": pltpu.VMEM((bq, wide), f32),
        "m": pltpu.VMEM((bq, LANES), f32),
        "l": pltpu.VMEM((bq, LANES), f32),
    }
    if rule.segments:
        scratch["ids"] = pltpu.VMEM((bq, LANES), jnp.int32)
    if rule.positions:
        scratch["places"] = pltpu.VMEM((bq, LANES), jnp.int32)
    if plan.rate is not None:
        scratch["drops"] = pltpu.VMEM((bq, LANES), jnp.int32)
    if plan.reach:
        scratch["tiles"] = pltpu.VMEM((each, plan.tiles, LANES, LANES), f32)
    names = ["table", *(x[0] for x in inputs), "o", "lse", *scratch]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(groups, batch, each, table.shape[1]),
        in_specs=[x[2] for x in inputs],
        out_specs=[
            pl.BlockSpec((1, 1, 1, bq, wide), by_query),
            pl.BlockSpec(lse, lambda k, b, g, p, t: (b, k, g, i(t, b, p), 0, 0)),
        ],
        scratch_shapes=list(scratch.values()),
    )
    blocks = rule.query_blocks
    return pl.pallas_call(
        functools.partial(kernel, plan, names),
        grid_spec=grid,
        out_shape=[
            jax.ShapeDtypeStruct((batch, groups, each, queries, wide), q.dtype),
            jax.ShapeDtypeStruct((batch, groups, each, blocks, 1, bq), f32),
        ],
        name="attention_forward",
        **parts.compiler_parameters(plan),
    )(table, *(x[1] for x in inputs))
