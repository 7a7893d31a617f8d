"""The forward kernel for GPUs: one program a block of queries of one head, which goes through the
blocks of keys that the rule leaves it, with an online softmax."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.attention import gpu_parts as parts
from kernels.attention.gpu_parts import MASKED, NT, Plan


def kernel(plan: Plan, ref) -> None:
    """m: the greatest score of each query so far. l: the sum of its weights. acc: that of the
    weighted values."""
    size = plan.size
    i = _place(plan, pl.program_id(0))
    queries = parts.side(plan, ref, "q", i * size.queries, 0)
    q = ref["q"][...]

    def body(near, masked, j, carry):
        m, l, acc = carry
        rows = pl.ds(j * size.keys, size.keys)
        k, v = ref["k"][rows, :], ref["v"][rows, :]
        keys = parts.side(plan, ref, "k", j * size.keys, 1)
        s = parts.dot(q, k, plan, NT)
        s, _, _ = parts.score(plan, ref, s, queries, keys, near, masked)
        after = jnp.maximum(m, jnp.max(s, axis=1))
        weights = jnp.exp2(s - after[:, None])
        kept = jnp.exp2(m - after)
        l = l * kept + jnp.sum(weights, axis=1)
        drops = (lambda: ref["q_drop"][...][:, None], lambda: ref["k_drop"][rows][None])
        weights = parts.drop(plan, weights, *drops)
        acc = acc * kept[:, None] + parts.dot(weights.astype(v.dtype), v, plan)
        return after, l, acc

    m = jnp.full((size.queries,), MASKED, jnp.float32)
    acc = jnp.zeros((size.queries, ref["v"].shape[-1]), jnp.float32)
    m, l, acc = parts.visit(plan, ref, body, (m, jnp.zeros_like(m), acc))
    inverse, log = 1 / l, m + jnp.log2(l)
    if plan.rule.lonely:
        seen = m > MASKED / 2
        # A query that sees nothing gets an infinite sum: probabilities of zero.
        inverse, log = jnp.where(seen, inverse, 0.0), jnp.where(seen, log, -MASKED)
    ref["o"][...] = (acc * inverse[:, None]).astype(ref["o"].dtype)
    ref["lse"][...] = log


def _place(plan: Plan, i):
    """The block of queries of program i: the last ones first, which in causal order see most."""
    return plan.rule.query_blocks - 1 - i


def forward(plan: Plan, arrays: dict, rows: dict, bias: dict, tables):
    """arrays: q [B, T, N, H], k [B, S, K, H], v [B, S, K, H_v], of whole blocks and widths of
    powers of two, q_drop [B, N, T] and k_drop [B, N, S] of dropout, or None; rows [B, T] or [B, S]:
    q_ids, k_ids, k_prefix, q_at, k_at, or None; bias: strip [N, span] or slopes [N, 1], or None.

    Returns the result [B, T, N, H_v] and the scores' log2 sums [B, N, T].
    """
    q, k, v = (arrays[name] for name in ("q", "k", "v"))
    (batch, length, heads, width), (_, keys, groups, wide) = q.shape, v.shape
    bq, blocks, each = plan.size.queries, plan.rule.query_blocks, heads // groups
    place = functools.partial(_place, plan)
    by_query = lambda i, n, b: (b, place(i), n, 0)  # noqa: E731
    by_group = lambda i, n, b: (b, 0, n // each, 0)  # noqa: E731
    inputs = {
        **parts.table_specs(tables, place),
        "q": (q, (None, bq, None, width), by_query),
        "k": (k, (None, keys, None, width), by_group),
        "v": (v, (None, keys, None, wide), by_group),
        **parts.row_specs(rows),
        **parts.bias_specs(bias, heads),
        "q_drop": (arrays["q_drop"], (None, None, bq), lambda i, n, b: (b, n, place(i))),
        "k_drop": (arrays["k_drop"], (None, None, keys), lambda i, n, b: (b, n, 0)),
    }
    lse = (batch, heads, length)
    outputs = {
        "o": (parts.shape((batch, length, heads, wide), q.dtype), (None, bq, None, wide), by_query),
        "lse": (
            parts.shape(lse, jnp.float32), (None, None, bq), lambda i, n, b: (b, n, place(i)),
        ),
    }  # fmt: skip
    found = parts.call(plan, kernel, "attention_forward", (blocks, heads, batch), inputs, outputs)
    return found["o"], found["lse"]
