"""What the GPU kernels share: their tables of blocks, and the mask and the bias of a block.

Scores are held in units of log2 (``exp2`` is one instruction), so scale and bias carry a factor
log2(e). The bias of distance is read from a strip of one value a distance: the entries of a
block that one load of a warp reads lie on a few neighbouring distances, in one or two lines of
the cache. A block whose distances all lie beyond the strip's ends takes one number instead, and
such blocks have a loop of their own, as have those that the rule leaves whole.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels.attention import blocks
from kernels.attention.blocks import EMPTY, FULL, Rule
from kernels.attention.dropout import kept

LOG2E = math.log2(math.e)
MASKED = -1e30  # of a score: finite, so that differences are
NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Size:
    """Queries and keys of a block, powers of two of at least 16; warps of a program, and how many
    blocks are in flight between memory and the multiplier."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """One kernel's call, in full; every field is known when the program is traced."""

    rule: Rule
    size: Size
    scale: float
    softcap: float | None = None
    reach: int = 0  # T5's bias: distances from here on are alike; 0: no such bias
    buckets: int = 0  # of it, where its gradient is summed by them: with positions
    sloped: bool = False  # ALiBi's bias
    rate: float | None = None  # of dropout
    interpret: bool = False

    @property
    def ahead(self) -> bool:
        """Whether a query may see later keys."""
        return not self.rule.causal or self.rule.prefix

    @property
    def span(self) -> int:
        """Length of the strip: a value for each distance of at most ``reach``."""
        return 2 * self.reach + 1


def dot(a, b, plan: Plan, dims=NN):
    """Product of two blocks into float32. Float32 operands are split in three of TF32 each, of
    which three products keep 21 bits; where that is interpreted, they are multiplied as such."""
    precision: Any = None
    if a.dtype == jnp.float32:
        exact = lax.Precision.HIGHEST
        precision = exact if plan.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


shape = jax.ShapeDtypeStruct


def tables(plan: Plan, marks: dict, by_key: bool = False) -> tuple[jax.Array, jax.Array]:
    """(order, counts): which blocks of keys each block of queries meets, int32
    [1 or B, query blocks, key blocks], and in [1 or B, query blocks, 3] where three groups of
    them end: whole with one number for a bias, whole, masked. By key: the other way round.

    marks: segments, kv_segments, prefix, positions, kv_positions, as ``blocks.kinds_of_pairs``.
    """
    rule = plan.rule
    kinds, _ = blocks.kinds_of_pairs(rule, **marks)
    xp = np if isinstance(kinds, np.ndarray) else jnp
    near = np.zeros(kinds.shape[1:], bool)
    if rule.positions:
        near = ~near  # which side of the strip a block lies on is not known from its place
    elif plan.reach:
        q0, q1, k0, k1 = blocks.edges_of(rule)
        near = (k1 - q0 > -plan.reach) & (k0 - q1 < plan.reach)
    group = xp.where(kinds == EMPTY, 3, xp.where(kinds == FULL, near, 2))
    if by_key:
        group = group.swapaxes(1, 2)
    order = xp.argsort(group, axis=2, stable=True)
    counts = xp.stack([(group <= n).sum(2) for n in range(3)], 2)
    return jnp.asarray(order, jnp.int32), jnp.asarray(counts, jnp.int32)


def visit(plan: Plan, ref, body, carry):
    """Runs ``body(near, masked, block, carry)`` over the blocks that the table names: ``near``
    where the bias differs within the block, ``masked`` where the rule leaves a part of it."""
    begin = jnp.int32(0)
    for group, (near, masked) in enumerate(((False, False), (True, False), (True, True))):
        never = (
            plan.reach > 0 and plan.rule.positions,
            plan.reach == 0 and not plan.rule.positions,
            len(plan.rule.kinds) == 1,
        )
        if never[group]:
            continue
        end = ref["counts"][group]

        def step(p, carry, near=near, masked=masked):
            return body(near, masked, ref["order"][p], carry)

        carry = lax.fori_loop(begin, end, step, carry)
        begin = end
    return carry


def side(plan: Plan, ref, name: str, start, axis: int, row: tuple = ()) -> dict:
    """What the rule says of a block of queries ("q") or keys ("k"), to be spread along ``axis`` of
    the scores: loads of what is needed, each a function. ``start``: its first index; ``row`` of
    the batch where the refs hold it whole."""
    size = plan.size.queries if name == "q" else plan.size.keys

    def load(what):
        x = ref[f"{name}_{what}"][(*row, pl.ds(start, size))]
        return jnp.expand_dims(x, 1 - axis)

    def index():
        return jnp.expand_dims(start + lax.iota(jnp.int32, size), 1 - axis)

    at = (lambda: load("at")) if plan.rule.positions else index
    return {"start": start, "index": index, "at": at, "load": load}


def score(plan: Plan, ref, products, q: dict, k: dict, near: bool, masked: bool, head=0):
    """(scores, slope, ahead) of a block: in units of log2 and masked; the derivative of the cap,
    or None; and the distances, key less query, or None where nothing asked for them.

    products: of queries and keys, before the scale. q, k: of ``side``. head: which of the strips
    and slopes, if the refs hold several.
    """
    slope: Any = None
    ahead: Any = None
    if plan.softcap is None:
        s = products * (plan.scale * LOG2E)
    else:
        bounded = jnp.tanh(products * (plan.scale / plan.softcap))
        s, slope = bounded * (plan.softcap * LOG2E), 1 - bounded * bounded
    ordered = masked and (plan.rule.causal or plan.rule.window is not None)
    if ordered or plan.sloped or (plan.reach and near):
        ahead = k["at"]() - q["at"]()
    if plan.reach:
        first = head * plan.span
        if near:
            s = s + ref["strip"][first + _on_strip(plan, ahead)]
        else:
            s = s + ref["strip"][first + _after(plan, q, k) * (plan.span - 1)]
    if plan.sloped:
        s = s - ref["slopes"][head] * jnp.abs(ahead).astype(jnp.float32)
    if masked:
        s = jnp.where(_seen(plan.rule, q, k, ahead), s, MASKED)
    return s, slope, ahead


def _on_strip(plan: Plan, ahead):
    """The strip's indices of distances."""
    return jnp.minimum(jnp.maximum(ahead, -plan.reach), plan.reach) + plan.reach


def _after(plan: Plan, q: dict, k: dict):
    """1 if a block beyond the strip has later keys, else 0. (As a number: Triton's lowering takes
    no choice between two constants.)"""
    return (k["start"] > q["start"]).astype(jnp.int32) if plan.ahead else 0


def _seen(rule: Rule, q: dict, k: dict, ahead):
    """The rule on a block, bool."""
    clauses = []
    if rule.causal:
        causal = ahead <= 0
        clauses.append(causal | (k["load"]("prefix") != 0) if rule.prefix else causal)
    if rule.window is not None:
        clauses.append(jnp.abs(ahead) < rule.window)
    if rule.segments:
        clauses.append(q["load"]("ids") == k["load"]("ids"))
    if rule.bounded:
        clauses.append(k["index"]() < rule.keys)
    mask = clauses[0]
    for clause in clauses[1:]:
        mask = mask & clause
    return mask


def drop(plan: Plan, x, rows, columns):
    """``x``, of a block of scores, after dropout; ``rows`` and ``columns`` of their axes."""
    if plan.rate is None:
        return x
    return jnp.where(kept(plan.rate, rows(), columns()), x / (1 - plan.rate), 0.0)


def beyond(plan: Plan, ds, q: dict, k: dict, ahead, near: bool):
    """Sums along keys of those of a block's values ``ds`` [queries, keys] that lie at or beyond the
    strip's ends, [queries] each: before the query, and after it where such keys are seen."""
    if not near:
        total = jnp.sum(ds, axis=1)
        after = jnp.float32(_after(plan, q, k))
        return [total * (1 - after), total * after][: 1 + plan.ahead]
    ends = [ahead <= -plan.reach, ahead >= plan.reach][: 1 + plan.ahead]
    return [jnp.sum(jnp.where(end, ds, 0.0), axis=1) for end in ends]


def by_bucket(plan: Plan, ref, ds, ahead):
    """Sums along keys of a block's values ``ds`` [queries, keys] of each bucket, [queries, buckets]
    (of a power of two)."""
    bucket = ref["bucket_of"][_on_strip(plan, ahead)]
    shape = (ds.shape[0], pl.next_power_of_2(plan.buckets))
    column = lax.broadcasted_iota(jnp.int32, shape, 1)

    def add(n, sums):
        row = jnp.sum(jnp.where(bucket == n, ds, 0.0), axis=1)
        return sums + jnp.where(column == n, row[:, None], 0.0)

    return lax.fori_loop(0, plan.buckets, add, jnp.zeros(shape, jnp.float32))


def call(plan: Plan, kernel, name: str, grid, inputs, outputs):
    """Runs ``kernel(plan, ref)`` with ``ref`` a dict of refs. inputs: name to (array, block shape,
    index map), those whose array is None left out; outputs: name to (shape and dtype, ...)."""
    inputs = {name: x for name, x in inputs.items() if x[0] is not None}
    names = [*inputs, *outputs]

    def run(*refs):
        kernel(plan, dict(zip(names, refs, strict=True)))

    run.__name__ = name
    found = pl.pallas_call(
        run,
        grid=grid,
        in_specs=[pl.BlockSpec(*x[1:]) for x in inputs.values()],
        out_specs=[pl.BlockSpec(*x[1:]) for x in outputs.values()],
        out_shape=[x[0] for x in outputs.values()],
        # Named in full: what a plain call compiles with differs between versions of JAX.
        compiler_params=triton.CompilerParams(
            num_warps=plan.size.warps, num_stages=plan.size.stages
        ),
        interpret=plan.interpret,
        name=name,
    )(*(x[0] for x in inputs.values()))
    return dict(zip(outputs, found, strict=True))


def row_specs(rows: dict) -> dict:
    """Inputs of ``call``, of the rows' arrays [B, length], a row whole, the grid's last axis over
    the batch."""
    return {
        name: (x, (None, x.shape[1]), lambda i, n, b: (b, 0)) if x is not None else (None,)
        for name, x in rows.items()
    }


def table_specs(tables, place=lambda i: i) -> dict:
    """Inputs of ``call``, of the tables: the row ``place(i)``, with i of the grid's first axis."""
    order, counts = tables
    shared = order.shape[0] == 1

    def index(i, n, b):
        return (0 if shared else b, place(i), 0)

    return {
        "order": (order, (None, None, order.shape[2]), index),
        "counts": (counts, (None, None, 3), index),
    }


def bias_specs(bias: dict, heads: int) -> dict:
    """Inputs of ``call``, of a bias's arrays [N, n], for ``heads`` programs in the grid's second
    axis: those of N / heads query heads each, one after the other."""
    flat = {name: x if x is None else x.reshape(heads, -1) for name, x in bias.items()}
    return {
        name: (None,) if x is None else (x, (None, x.shape[1]), lambda i, n, b: (n, 0))
        for name, x in flat.items()
    }
