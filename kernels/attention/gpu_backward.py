"""The backward kernels for GPUs: one for keys and values, one for queries, one for T5's bias.

Each computes the probabilities again from the scores' sums, so that no program writes where
another does, and the result does not depend on which comes first. T5's bias is constant along
diagonals: its kernel sums up the blocks that lie on one diagonal of blocks, and the blocks' own
diagonals are summed once, afterwards. What lies beyond the strip's ends is summed with the
gradient of the queries, and so is all of it, bucket by bucket, where positions bend the diagonals.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.attention import gpu_parts as parts
from kernels.attention.gpu_parts import NT, Plan

# Programs of the bias's kernel: enough to fill a GPU of some 100 multiprocessors four times, few
# enough that their sums are small; and the fewest blocks of a program, for the same reason.
BIAS_PROGRAMS = 512
LEAST_BLOCKS = 4


def keys_kernel(plan: Plan, ref) -> None:
    """Gradients of a block of keys and values, over all query heads that share them. Scores lie
    transposed, [keys, queries], so that every product but one takes its operands as they lie."""
    size, each = plan.size, ref["q"].shape[1]
    j = pl.program_id(0)
    keys = parts.side(plan, ref, "k", j * size.keys, 0)
    k, v = ref["k"][...], ref["v"][...]

    def of_head(g, carry):
        def body(near, masked, i, carry):
            dk, dv = carry
            rows = pl.ds(i * size.queries, size.queries)
            q, do = ref["q"][rows, g, :], ref["do"][rows, g, :]
            queries = parts.side(plan, ref, "q", i * size.queries, 1)
            s = parts.dot(k, q, plan, NT)
            s, slope, _ = parts.score(plan, ref, s, queries, keys, near, masked, g)
            weights = jnp.exp2(s - ref["lse"][g, rows][None, :])
            drops = (lambda: ref["q_drop"][g, rows][None], lambda: ref["k_drop"][g, :][:, None])
            left = parts.drop(plan, weights, *drops)
            dv = dv + parts.dot(left.astype(do.dtype), do, plan)
            dp = parts.drop(plan, parts.dot(v, do, plan, NT), *drops)
            ds = weights * (dp - ref["delta"][g, rows][None, :])
            ds = ds if slope is None else ds * slope
            return dk + parts.dot(ds.astype(q.dtype), q, plan), dv

        return parts.visit(plan, ref, body, carry)

    carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    dk, dv = of_head(0, carry) if each == 1 else lax.fori_loop(0, each, of_head, carry)
    ref["dk"][...] = (dk * plan.scale).astype(k.dtype)
    ref["dv"][...] = dv.astype(v.dtype)


def queries_kernel(plan: Plan, ref) -> None:
    """Gradients of a block of queries, and what each of its rows adds to that of the bias."""
    size = plan.size
    i = pl.program_id(0)
    queries = parts.side(plan, ref, "q", i * size.queries, 0)
    q, do, lse, delta = (ref[name][...] for name in ("q", "do", "lse", "delta"))

    def body(near, masked, j, carry):
        dq, *sums = carry
        rows = pl.ds(j * size.keys, size.keys)
        k, v = ref["k"][rows, :], ref["v"][rows, :]
        keys = parts.side(plan, ref, "k", j * size.keys, 1)
        s = parts.dot(q, k, plan, NT)
        s, slope, ahead = parts.score(plan, ref, s, queries, keys, near, masked)
        drops = (lambda: ref["q_drop"][...][:, None], lambda: ref["k_drop"][rows][None])
        dp = parts.drop(plan, parts.dot(do, v, plan, NT), *drops)
        ds = jnp.exp2(s - lse[:, None]) * (dp - delta[:, None])
        if plan.sloped:
            new = [-jnp.sum(ds * jnp.abs(ahead).astype(jnp.float32), axis=1)]
        elif plan.buckets:
            new = [parts.by_bucket(plan, ref, ds, ahead)]
        else:
            new = parts.beyond(plan, ds, queries, keys, ahead, near) if plan.reach else []
        ds = ds if slope is None else ds * slope
        dq = dq + parts.dot(ds.astype(k.dtype), k, plan)
        return dq, *(a + b for a, b in zip(sums, new, strict=True))

    count = _sums(plan)
    if plan.buckets:
        start = [jnp.zeros((size.queries, count), jnp.float32)]
    else:
        start = [jnp.zeros((size.queries,), jnp.float32)] * count
    dq, *sums = parts.visit(plan, ref, body, (jnp.zeros(q.shape, jnp.float32), *start))
    ref["dq"][...] = (dq * plan.scale).astype(q.dtype)
    if plan.buckets:
        ref["sums"][...] = sums[0]
        return
    for n, total in enumerate(sums):
        ref["sums"][:, n] = total


def _sums(plan: Plan) -> int:
    """Numbers that a query adds to the bias's gradient."""
    if plan.buckets:
        return pl.next_power_of_2(plan.buckets)
    return 1 + plan.ahead if plan.reach else int(plan.sloped)


def bias_kernel(plan: Plan, diagonals: tuple[int, int], ref) -> None:
    """The sum of the scores' gradients over the blocks of one diagonal of blocks, for one head and
    a piece of all rows' blocks of queries. ``diagonals``: the first one, and blocks of a piece."""
    rule, size, (first, most) = plan.rule, plan.size, diagonals
    away = pl.program_id(0) + first
    piece = pl.program_id(2)

    def body(at, total):
        b, i = lax.div(at, rule.query_blocks), lax.rem(at, rule.query_blocks)
        j = i + away
        inside = (j >= 0) & (j < rule.key_blocks)
        j = jnp.minimum(jnp.maximum(j, 0), rule.key_blocks - 1)
        q_rows, k_rows = (pl.ds(n * size.queries, size.queries) for n in (i, j))
        q, do = ref["q"][b, q_rows, :], ref["do"][b, q_rows, :]
        k, v = ref["k"][b, k_rows, :], ref["v"][b, k_rows, :]
        queries = parts.side(plan, ref, "q", i * size.queries, 0, (b,))
        keys = parts.side(plan, ref, "k", j * size.keys, 1, (b,))
        s = parts.dot(q, k, plan, NT)
        s, _, _ = parts.score(plan, ref, s, queries, keys, True, len(rule.kinds) > 1)
        drops = (
            lambda: ref["q_drop"][b, q_rows][:, None],
            lambda: ref["k_drop"][b, k_rows][None],
        )
        dp = parts.drop(plan, parts.dot(do, v, plan, NT), *drops)
        weights = jnp.exp2(s - ref["lse"][b, q_rows][:, None])
        ds = weights * (dp - ref["delta"][b, q_rows][:, None])
        return total + jnp.where(inside, ds, 0.0)

    count = ref["q"].shape[0] * rule.query_blocks
    begin = piece * most
    total = jnp.zeros((size.queries, size.keys), jnp.float32)
    total = lax.fori_loop(begin, jnp.minimum(begin + most, count), body, total)
    ref["d_tiles"][...] = total


def of_keys(plan: Plan, arrays: dict, rows: dict, bias: dict, tables):
    """(dk, dv). arrays: q, do [B, T, N, .], k, v [B, S, K, .], lse, delta and q_drop [B, N, T],
    k_drop [B, N, S], the last two or None; the rest as of ``gpu_forward.forward``."""
    q, k, v, do = (arrays[name] for name in ("q", "k", "v", "do"))
    (batch, length, heads, _), groups = q.shape, k.shape[2]
    each = heads // groups
    whole = lambda j, n, b: (b, 0, n, 0)  # noqa: E731
    block = lambda j, n, b: (b, j, n, 0)  # noqa: E731
    inputs = {
        **parts.table_specs(tables),
        "q": (q, (None, length, each, q.shape[-1]), whole),
        "do": (do, (None, length, each, do.shape[-1]), whole),
        "k": (k, (None, plan.size.keys, None, k.shape[-1]), block),
        "v": (v, (None, plan.size.keys, None, v.shape[-1]), block),
        **{
            name: (arrays[name], (None, each, length), lambda j, n, b: (b, n, 0))
            for name in ("lse", "delta", "q_drop")
        },
        "k_drop": (arrays["k_drop"], (None, each, plan.size.keys), lambda j, n, b: (b, n, j)),
        **parts.row_specs(rows),
        **parts.bias_specs(bias, groups),
    }
    outputs = {
        f"d{name}": (parts.shape(x.shape, x.dtype), *inputs[name][1:])
        for name, x in (("k", k), ("v", v))
    }
    grid = (plan.rule.key_blocks, groups, batch)
    found = parts.call(plan, keys_kernel, "attention_keys", grid, inputs, outputs)
    return found["dk"], found["dv"]


def of_queries(plan: Plan, arrays: dict, rows: dict, bias: dict, tables):
    """(dq, sums): the gradient of q, and what each query adds to that of the bias, float32
    [B, N, T, n] or None: beyond the strip's ends, or of the slope, or of every bucket (for which
    the bias has "bucket_of" of the strip, int32 [N, span]). Arguments as of ``of_keys``."""
    q, k, v = (arrays[name] for name in ("q", "k", "v"))
    (batch, length, heads, _), groups = q.shape, k.shape[2]
    each, bq = heads // groups, plan.size.queries
    block = lambda i, n, b: (b, i, n, 0)  # noqa: E731
    whole = lambda i, n, b: (b, 0, n // each, 0)  # noqa: E731
    inputs = {
        **parts.table_specs(tables),
        **{
            name: (arrays[name], (None, bq, None, arrays[name].shape[-1]), block)
            for name in ("q", "do")
        },
        **{
            name: (x, (None, x.shape[1], None, x.shape[-1]), whole)
            for name, x in (("k", k), ("v", v))
        },
        **{
            name: (arrays[name], (None, None, bq), lambda i, n, b: (b, n, i))
            for name in ("lse", "delta", "q_drop")
        },
        "k_drop": (arrays["k_drop"], (None, None, k.shape[1]), lambda i, n, b: (b, n, 0)),
        **parts.row_specs(rows),
        **parts.bias_specs(bias, heads),
    }
    outputs = {"dq": (parts.shape(q.shape, q.dtype), *inputs["q"][1:])}
    if count := _sums(plan):
        outputs["sums"] = (
            parts.shape((batch, heads, length, count), jnp.float32),
            (None, None, bq, count),
            lambda i, n, b: (b, n, i, 0),
        )
    grid = (plan.rule.query_blocks, heads, batch)
    found = parts.call(plan, queries_kernel, "attention_queries", grid, inputs, outputs)
    return found["dq"], found.get("sums")


def of_strip(plan: Plan, arrays: dict, rows: dict, bias: dict, sums):
    """The gradient of the strip [N, span]. ``sums``: of ``of_queries``; the rest as there."""
    q, k, v = (arrays[name] for name in ("q", "k", "v"))
    (batch, _, heads, _), groups = q.shape, k.shape[2]
    each, size = heads // groups, plan.size.queries
    first, tiles = diagonals(plan)
    count = batch * plan.rule.query_blocks
    pieces = min(-(-count // LEAST_BLOCKS), -(-BIAS_PROGRAMS // (heads * tiles)))
    most = -(-count // pieces)
    of_head = lambda t, n, p: (0, 0, n, 0)  # noqa: E731
    of_group = lambda t, n, p: (0, 0, n // each, 0)  # noqa: E731
    inputs = {
        **{
            name: (x, (*x.shape[:2], None, x.shape[-1]), index)
            for name, x, index in (
                ("q", q, of_head), ("do", arrays["do"], of_head),
                ("k", k, of_group), ("v", v, of_group),
            )
        },
        **{
            name: (x, (x.shape[0], None, x.shape[2]), lambda t, n, p: (0, n, 0))
            for name, x in (
                (name, arrays[name]) for name in ("lse", "delta", "q_drop", "k_drop")
            )
            if x is not None
        },
        **{
            name: (x, x.shape, lambda t, n, p: (0, 0)) if x is not None else (None,)
            for name, x in rows.items()
        },
        **parts.bias_specs(bias, heads),
    }  # fmt: skip
    outputs = {
        "d_tiles": (
            parts.shape((pieces, heads, tiles, size, size), jnp.float32),
            (None, None, None, size, size),
            lambda t, n, p: (p, n, t, 0, 0),
        )
    }
    kernel = lambda plan, ref: bias_kernel(plan, (first, most), ref)  # noqa: E731
    grid = (tiles, heads, pieces)
    found = parts.call(plan, kernel, "attention_bias", grid, inputs, outputs)
    strip = _strip_of(plan, found["d_tiles"].sum(0), first)
    ends = sums.sum((0, 2)).T  # [1 or 2, N]
    strip = strip.at[:, 0].set(ends[0])
    return strip.at[:, -1].set(ends[1]) if plan.ahead else strip


def diagonals(plan: Plan) -> tuple[int, int]:
    """The first of the diagonals of blocks that hold distances within the strip, and how many."""
    # The blocks of a diagonal n away hold distances from (n - 1) * size + 1 on.
    far = -(-(plan.reach - 1) // plan.size.queries)
    return -far, 2 * far + 1 if plan.ahead else far + 1


def _strip_of(plan: Plan, tiles, first: int):
    """Sums along the diagonals of tiles [N, tiles, size, size], of which the first is ``first``
    tiles off the main one, as a strip; its ends are left zero."""
    heads, count, size, _ = tiles.shape
    # Rows of 2 * size read with a stride of 2 * size - 1 start each row one value later: with the
    # last row first, column n holds the distance n - (size - 1), but for the tile's place.
    wide = jnp.pad(tiles[:, :, ::-1], ((0, 0),) * 3 + ((0, size),))
    rows = wide.reshape(heads, count, -1)[..., : size * (2 * size - 1)]
    sums = rows.reshape(heads, count, size, 2 * size - 1).sum(2)
    total = jnp.zeros((heads, (count + 1) * size - 1), jnp.float32)
    for n in range(count):
        total = total.at[:, n * size : n * size + 2 * size - 1].add(sums[:, n])
    start = -size * first + size - 1 - (plan.reach - 1)  # of the distance 1 - reach
    inner = total[:, start : start + plan.span - 2]
    missing = plan.span - 2 - inner.shape[1]
    return jnp.pad(inner, ((0, 0), (1, 1 + missing)))
