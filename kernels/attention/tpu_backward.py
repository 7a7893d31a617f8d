"""The backward kernel for TPUs: all gradients in one pass over the pairs of blocks.

Scores lie transposed here, [keys, queries], so that the sums of each query are a row of lanes and
three of the five products take their operands as they lie. The gradients of keys and values are
held in VMEM for the whole length, those of the queries for a block, those of the bias as one sum
a tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import dropout
from kernels.attention import tpu_parts as parts
from kernels.attention.blocks import DIAGONAL, word_at
from kernels.attention.tpu_parts import LANES, LOG2E, MASKED, NT, Plan


def kernel(plan: Plan, names, *refs):
    """One pair of blocks of one head. ``names`` says which of the optional refs there are."""
    ref = dict(zip(names, refs, strict=True))
    rule = plan.rule
    b, g, p = (pl.program_id(axis) for axis in (1, 2, 3))
    last_b, last_g, last_p = (pl.num_programs(axis) - 1 for axis in (1, 2, 3))
    word = word_at(ref["table"], b, p)
    i, j, kind = parts.fields(word)

    @pl.when((g == 0) & (p == 0))
    def _():
        _each_block(rule, lambda at: _fill(ref, at, 0.0))

    if plan.reach:

        @pl.when((b == 0) & (p == 0))
        def _():
            parts.lay_tiles(ref["strip"].at[0, 0], ref["tiles"].at[g], plan)
            for name in ("sums", "beyond") if plan.sloped else ("sums",):
                ref[name][g] = jnp.zeros(ref[name].shape[1:], jnp.float32)

    @pl.when(word & 1 == 1)
    def _():
        ref["dq_t"][...] = jnp.zeros_like(ref["dq_t"])
        o, do = (ref[name][0, 0, 0].astype(jnp.float32) for name in ("o", "do"))
        ref["delta"][...] = parts.down(jnp.sum(o * do, axis=1, keepdims=True))

    def body(kind):
        if rule.segments:
            ref["ids"][...] = parts.across(ref["k_ids"][0])
        if rule.prefix and kind != DIAGONAL:
            ref["marks"][...] = parts.across(ref["prefix"][0])
        if rule.positions:
            ref["places"][...] = parts.across(ref["k_places"][0])
        if plan.rate is not None:
            ref["drops"][...] = parts.across(ref["k_drop"][0, 0, 0, 0])
        ref["k_t"][...] = ref["k"][0, 0].T
        chunks = parts.in_chunks(rule.block_q, plan.backward_chunk)
        for chunk in chunks:
            _chunk(plan, ref, kind, (g, i, j), *chunk)

    parts.kinds_of(rule, kind, body)

    @pl.when(word & 2 == 2)
    def _():
        ref["dq"][0, 0, 0] = (ref["dq_t"][...].T * plan.scale).astype(ref["dq"].dtype)

    if plan.reach:

        @pl.when((b == last_b) & (p == last_p))
        def _():
            parts.gather_tiles(ref["sums"].at[g], ref["d_strip"].at[0, g], plan)
            if plan.sloped:
                ref["d_far"][0, g] = jnp.sum(ref["beyond"][g], axis=0, keepdims=True)

    @pl.when((g == last_g) & (p == last_p))
    def _():
        _each_block(rule, lambda at: _write(plan, ref, at))


def _each_block(rule, body) -> None:
    size = rule.block_k

    def step(n, _):
        body(pl.ds(n * size, size))

    lax.fori_loop(0, rule.key_blocks, step, None)


def _fill(ref, at, value) -> None:
    for name in ("dk_sum", "dv_sum"):
        ref[name][at] = jnp.full((at.size, ref[name].shape[1]), value, jnp.float32)


def _write(plan: Plan, ref, at) -> None:
    ref["dk"][0, 0, at] = (ref["dk_sum"][at] * plan.scale).astype(ref["dk"].dtype)
    dv = ref["dv_sum"][at]
    dv = dv if plan.rate is None else dv / (1 - plan.rate)
    ref["dv"][0, 0, at] = dv.astype(ref["dv"].dtype)


def _chunk(plan: Plan, ref, kind, place, begin: int, end: int) -> None:
    """Gradients through the scores of one chunk of the block's queries."""
    rule, (g, i, j) = plan.rule, place
    keys = parts.keys_seen(rule, kind, end)
    q, do = (ref[name][0, 0, 0, begin:end] for name in ("q", "do"))
    k, v = (ref[name][0, 0, :keys] for name in ("k", "v"))
    s = parts.dot(k, q, NT)  # [keys, queries]
    dp = parts.dot(v, do, NT)
    bounded = None
    if plan.softcap is None:
        s = s * (plan.scale * LOG2E)
    else:
        bounded = jnp.tanh(s * (plan.scale / plan.softcap))
        s = bounded * (plan.softcap * LOG2E)
    # From here on a tile's place is that of its keys less that of its queries.
    diagonal = None
    if plan.reach:
        # The tiles were laid for distances query less key: see ``backward``.
        diagonal = (i * rule.block_q + parts.offset(plan, ref) + begin - j * rule.block_k) >> 7
        far = ref["far"][0, 0, 0, 0] * LOG2E if plan.sloped else None
        s = s + parts.block_bias(plan, ref["tiles"].at[g], far, s.shape, diagonal)
    s = _masked(plan, kind, ref, s, begin, (i, j))
    weights = jnp.exp2(s - ref["lse"][0, 0, 0, 0][:, begin:end])
    left = weights
    if plan.rate is not None:
        drops = parts.tile_lanes(ref["drops"][:keys], end - begin)
        keep = dropout.kept(plan.rate, ref["q_drop"][0, 0, 0, 0][:, begin:end], drops)
        left = jnp.where(keep, weights, 0.0)
        dp = jnp.where(keep, dp / (1 - plan.rate), 0.0)
    ds = weights * (dp - ref["delta"][:, begin:end])
    if plan.reach:
        _sum_tiles(plan, ref, g, ds, diagonal)
    if bounded is not None:
        ds = ds * (1 - bounded * bounded)
    at = pl.ds(j * rule.block_k, keys)
    ref["dv_sum"][at] += parts.dot(left.astype(do.dtype), do)
    ds = ds.astype(q.dtype)
    ref["dk_sum"][at] += parts.dot(ds, q)
    ref["dq_t"][:, begin:end] += parts.dot(ref["k_t"][:, :keys], ds)


def _sum_tiles(plan: Plan, ref, g, ds, diagonal) -> None:
    rows, lanes = (n // LANES for n in ds.shape)
    for d in range(1 - rows, lanes):
        tiles = [
            ds[a * LANES : (a + 1) * LANES, (a + d) * LANES : (a + d + 1) * LANES]
            for a in range(rows)
            if 0 <= a + d < lanes
        ]
        total = functools.reduce(jnp.add, tiles)
        tile, beyond = parts.tile_index(plan, diagonal + d)
        ref["sums"][g, tile] += total
        if plan.sloped:
            ref["beyond"][g] += total * beyond.astype(jnp.float32)


def _masked(plan: Plan, kind, ref, s, begin, pair):
    """Scores [keys, queries] of queries from ``begin`` on, with what the rule forbids masked."""
    rule, (keys, queries) = plan.rule, s.shape

    def mask(s, at):
        size = s.shape[0]
        start = (begin, at)  # in a diagonal block both count from the same index
        if kind != DIAGONAL:
            i, j = pair
            start = (i * rule.block_q + rule.offset + begin, j * rule.block_k + at)
        ids = None
        if rule.segments:
            k_ids = parts.tile_lanes(ref["ids"][at : at + size], queries)
            ids = (ref["q_ids"][0][:, begin : begin + queries], k_ids)
        prefix = None
        if rule.prefix and kind != DIAGONAL:
            prefix = parts.tile_lanes(ref["marks"][at : at + size], queries)
        places = None
        if rule.positions:
            k_places = parts.tile_lanes(ref["places"][at : at + size], queries)
            places = (ref["q_places"][0][:, begin : begin + queries], k_places)
        seen = parts.mask_of(rule, kind, s.shape, start, 1, ids, prefix, places)
        return s if seen is None else jnp.where(seen, s, MASKED)

    before = keys - queries
    if kind == DIAGONAL and not rule.segments and rule.window is None and before > 0:
        return jnp.concatenate([s[:before], mask(s[before:], before)], axis=0)
    return mask(s, 0)


def backward(plan: Plan, table, inputs, strip, far, results):
    """Gradients of q, k, v, strip and far; arguments as of ``tpu_forward.forward``, and
    ``results``: what that returned, with the gradient of the first in between."""
    q, k, v, q_ids, k_ids, prefix, q_places, k_places, shift, q_drop, k_drop = inputs
    o, do, lse = results
    (batch, groups, each, _, width), wide = q.shape, v.shape[-1]
    rule = plan.rule
    bq, bk, keys = rule.block_q, rule.block_k, rule.padded_keys
    f32 = jnp.float32

    def i(table, b, p):
        return parts.fields(word_at(table, b, p))[0]

    def j(table, b, p):
        return parts.fields(word_at(table, b, p))[1]

    by_query = lambda k, b, g, p, t: (b, k, g, i(t, b, p), 0)  # noqa: E731
    by_key = lambda k, b, g, p, t: (b, k, j(t, b, p), 0)  # noqa: E731
    whole = lambda k, b, g, p, t: (b, k, 0, 0)  # noqa: E731
    of_group = lambda k, b, g, p, t: (k, 0, 0, 0)  # noqa: E731
    head = lambda k, b, g, p, t: (k, g, 0, 0)  # noqa: E731
    keys_row = pl.BlockSpec((1, 1, bk), lambda k, b, g, p, t: (b, 0, j(t, b, p)))
    query_row = pl.BlockSpec((1, 1, bq), lambda k, b, g, p, t: (b, 0, i(t, b, p)))
    lse_block = pl.BlockSpec((1, 1, 1, 1, 1, bq), lambda k, b, g, p, t: (b, k, g, i(t, b, p), 0, 0))
    drop = (1, 1, 1, 1, 1, bk)
    # Transposed scores have distances the other way round.
    flipped = None if strip is None else _flipped(strip)
    inputs = [
        ("q", q, pl.BlockSpec((1, 1, 1, bq, width), by_query)),
        ("k", k, pl.BlockSpec((1, 1, bk, width), by_key)),
        ("v", v, pl.BlockSpec((1, 1, bk, wide), by_key)),
        ("o", o, pl.BlockSpec((1, 1, 1, bq, wide), by_query)),
        ("do", do, pl.BlockSpec((1, 1, 1, bq, wide), by_query)),
        ("lse", lse, lse_block),
        ("q_ids", q_ids, query_row),
        ("k_ids", k_ids, keys_row),
        ("prefix", prefix, keys_row),
        ("q_places", q_places, query_row),
        ("k_places", k_places, keys_row),
        ("shift", shift, pl.BlockSpec((1, 1), lambda *_: (0, 0), memory_space=pltpu.SMEM)),
        ("q_drop", q_drop, lse_block),
        ("k_drop", k_drop, pl.BlockSpec(drop, lambda k, b, g, p, t: (b, k, g, j(t, b, p), 0, 0))),
        ("strip", flipped, pl.BlockSpec((1, 1, plan.tiles + 1, LANES), head)),
        ("far", far, pl.BlockSpec((1, 1, 1, 1), head, memory_space=pltpu.SMEM)),
    ]
    inputs = [x for x in inputs if x[1] is not None]
    shape = jax.ShapeDtypeStruct
    outputs = {
        "dq": (shape(q.shape, q.dtype), pl.BlockSpec((1, 1, 1, bq, width), by_query)),
        "dk": (shape(k.shape, k.dtype), pl.BlockSpec((1, 1, keys, width), whole)),
        "dv": (shape(v.shape, v.dtype), pl.BlockSpec((1, 1, keys, wide), whole)),
    }
    scratch = {
        "k_t": pltpu.VMEM((width, bk), k.dtype),
        "dq_t": pltpu.VMEM((width, bq), f32),
        "dk_sum": pltpu.VMEM((keys, width), f32),
        "dv_sum": pltpu.VMEM((keys, wide), f32),
        "delta": pltpu.VMEM((1, bq), f32),
    }
    if rule.segments:
        scratch["ids"] = pltpu.VMEM((bk, LANES), jnp.int32)
    if rule.prefix:
        scratch["marks"] = pltpu.VMEM((bk, LANES), jnp.int32)
    if rule.positions:
        scratch["places"] = pltpu.VMEM((bk, LANES), jnp.int32)
    if plan.rate is not None:
        scratch["drops"] = pltpu.VMEM((bk, LANES), jnp.int32)
    if plan.reach:
        tiles = (each, plan.tiles, LANES, LANES)
        outputs["d_strip"] = (
            shape((groups, each, plan.tiles + 1, LANES), f32),
            pl.BlockSpec((1, each, plan.tiles + 1, LANES), of_group),
        )
        scratch |= {"tiles": pltpu.VMEM(tiles, f32), "sums": pltpu.VMEM(tiles, f32)}
    if plan.sloped:
        outputs["d_far"] = (
            shape((groups, each, 1, LANES), f32),
            pl.BlockSpec((1, each, 1, LANES), of_group),
        )
        scratch["beyond"] = pltpu.VMEM((each, LANES, LANES), f32)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(groups, batch, each, table.shape[1]),
        in_specs=[x[2] for x in inputs],
        out_specs=[x[1] for x in outputs.values()],
        scratch_shapes=list(scratch.values()),
    )
    names = ["table", *(x[0] for x in inputs), *outputs, *scratch]
    gradients = pl.pallas_call(
        functools.partial(kernel, plan, names),
        grid_spec=grid,
        out_shape=[x[0] for x in outputs.values()],
        name="attention_backward",
        **parts.compiler_parameters(plan),
    )(table, *(x[1] for x in inputs))
    found = dict(zip(outputs, gradients, strict=True))
    d_strip = d_far = None
    if plan.reach:
        d_strip = _flipped(found["d_strip"])
    if plan.sloped:
        d_far = found["d_far"].sum(-1, keepdims=True)
    return found["dq"], found["dk"], found["dv"], d_strip, d_far


def _flipped(strip):
    """A strip [K, G, tiles + 1, 128] with distances negated. Its first value, whose distance has
    no opposite in it, is in no tile."""
    flat = strip.reshape(*strip.shape[:2], -1)
    return jnp.concatenate([flat[..., :1], flat[..., :0:-1]], -1).reshape(strip.shape)
