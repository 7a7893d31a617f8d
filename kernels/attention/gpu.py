"""Attention on NVIDIA GPUs by Pallas kernels, from Ampere on: layouts and padding.

The kernels are lowered by Triton, which serves Ampere, Ada and Hopper alike. A lowering for newer
chips alone (Mosaic GPU) would be a second ``gpu_forward`` and ``gpu_backward``, with a ``Sizes`` of
its own, chosen where ``attention`` makes its plans.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import gpu_backward, gpu_forward, kernel
from kernels.attention import gpu_parts as parts
from kernels.attention.bias import ALiBi, RelativeBias, by_distance
from kernels.attention.blocks import Rule
from kernels.attention.gpu_parts import LOG2E, MASKED, Plan, Size
from kernels.attention.rule import row_indices

LEAST = 16  # rows and columns of a product of blocks


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Blocks of each kernel; those of the bias's kernel are square."""

    forward: Size
    keys: Size
    queries: Size
    bias: Size


def sizes_of(width: int, dtype) -> Sizes:
    """Blocks for heads of ``width`` (a power of two; of values, if that is more).

    Chosen by what ptxas 12.9 says of the kernels for compute capabilities 8.0, 8.9 and 9.0, with
    each bias and kind of mask: the largest of those tried that keep to the registers and, on 8.0
    and 8.9, to 97 KiB of shared memory, so that every one of the three can run them. Less than 100
    bytes a thread spill, but for float32 and T5's bias: 280 at width 128, 9 KB at 256. No time was
    measured.
    """
    if dtype == jnp.float32 and width <= 64:
        return Sizes(Size(32, 32), Size(32, 32), Size(32, 32), Size(32, 32))
    if dtype == jnp.float32 and width <= 128:
        return Sizes(Size(32, 32, 8), Size(32, 32, 8, 1), Size(32, 32, 8, 1), Size(16, 16, 4, 1))
    if dtype == jnp.float32:
        return Sizes(Size(16, 16), Size(16, 16, 8, 1), Size(16, 16, 8, 1), Size(16, 16, 4, 1))
    if width <= 64:
        return Sizes(Size(128, 64), Size(64, 64), Size(64, 64), Size(64, 64))
    if width <= 128:
        return Sizes(Size(128, 64, 8), Size(64, 64, 8), Size(64, 64, 8), Size(64, 64, 8))
    return Sizes(Size(64, 32, 8), Size(32, 32, 8), Size(32, 32, 8), Size(32, 32, 8))


def unserved(q, k, v, *, bias, **_) -> str | None:
    """The argument that these kernels cannot serve, or None; arguments as of ``attention``."""
    refused = {
        "bias (an array)": bias is not None and not isinstance(bias, RelativeBias | ALiBi),
        "dtype": q.dtype not in (jnp.float32, jnp.bfloat16) or {k.dtype, v.dtype} != {q.dtype},
        "width of heads": max(q.shape[-1], v.shape[-1]) > 256,
    }
    return next((name for name, is_refused in refused.items() if is_refused), None)


def attention(q, k, v, *, bias=None, **arguments) -> jax.Array:
    """As ``kernels.attention.attention``, with ``scale`` given. ``sizes``: None for ``sizes_of``;
    ``interpret``: to run where there is no GPU.

    Raises NotImplementedError for what ``unserved`` names.
    """
    results: Any = kernel.attend(*prepared(q, k, v, bias=bias, **arguments))
    return results[0]


def prepared(
    q, k, v, *, bias=None, sizes: Sizes | None = None, scale, softcap=None, causal=False,
    window=None, dropout=None, interpret: bool = False, **marks,
):  # fmt: skip
    """(kernel, q, k, v, bias, marks): what ``kernel.attend`` takes. Arguments as of
    ``attention``."""
    refused = unserved(q, k, v, bias=bias)
    if refused is not None:
        raise NotImplementedError(f"implementation='pallas_gpu' does not serve this {refused}")
    marks = {name: marks.get(name) for name in kernel.MARKS} | {"dropout": dropout}
    placed = marks["positions"] is not None or marks["kv_positions"] is not None
    rule = {
        "causal": causal,
        "window": window,
        "segments": marks["segments"] is not None,
        "prefix": marks["prefix"] is not None,
        "positions": placed and (causal or window is not None or bias is not None),
    }
    options = {"scale": float(scale), "softcap": softcap, "interpret": interpret}
    options["rate"] = None if dropout is None else dropout.rate
    width = max(q.shape[-1], v.shape[-1])
    plans = plans_for(q.shape[1], k.shape[1], width, q.dtype, bias, sizes, rule, **options)
    return plans, q, k, v, bias, marks


@dataclasses.dataclass(frozen=True)
class Plans:
    """Of the four kernels."""

    of_forward: Plan
    of_keys: Plan
    of_queries: Plan
    of_bias: Plan

    @property
    def padded(self) -> tuple[int, int]:
        """Lengths of queries and keys that are whole blocks of every kernel."""
        rules = [getattr(self, field.name).rule for field in dataclasses.fields(self)]
        return max(r.padded_queries for r in rules), max(r.padded_keys for r in rules)

    @property
    def options(self) -> dict[str, Any]:
        return kernel.options(self.of_forward)

    def forward(self, q, k, v, bias, marks):
        """See ``kernel.Kernel``."""
        plan, queries = self.of_forward, self.of_forward.rule.queries
        arrays, rows, marks = _padded(self, q, k, v, marks)
        table = parts.tables(plan, _cut(plan, marks))
        out, lse = gpu_forward.forward(plan, arrays, rows, _strips(self, bias), table)
        return out[:, :queries, :, : v.shape[-1]], lse[..., :queries]

    def gradients(self, q, k, v, bias, marks, out, lse, g):
        """See ``kernel.Kernel``."""
        arrays, rows, marks = _padded(self, q, k, v, marks)
        queries, keys = self.of_forward.rule.queries, self.of_forward.rule.keys
        length = self.padded[0]
        delta = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
        arrays["do"] = _pad(g, {1: length, 3: power_of_two(g.shape[-1])})
        # Queries of padding have probabilities of zero.
        arrays["lse"] = _pad(lse, {2: length}, -MASKED)
        arrays["delta"] = _pad(delta, {2: length})
        strips, pull = jax.vjp(lambda bias: _strips(self, bias), bias)
        plan = self.of_keys
        table = parts.tables(plan, _cut(plan, marks), by_key=True)
        dk, dv = gpu_backward.of_keys(plan, arrays, rows, strips, table)
        plan = self.of_queries
        table = parts.tables(plan, _cut(plan, marks))
        given = strips | _buckets(plan, bias)
        dq, sums = gpu_backward.of_queries(plan, arrays, rows, given, table)
        sums: Any = None if sums is None else sums[:, :, :queries]
        d_strips, plan = dict.fromkeys(strips), self.of_bias
        if plan.buckets:
            d_strips["strip"] = jnp.zeros_like(strips["strip"])
        elif plan.reach:
            d_strips["strip"] = gpu_backward.of_strip(plan, arrays, rows, strips, sums) / LOG2E
        if plan.sloped:
            d_strips["slopes"] = sums.sum((0, 2)) / LOG2E
        (d_bias,) = pull(d_strips)
        if plan.buckets:
            d_table = sums.sum((0, 2))[:, : plan.buckets]
            d_bias = dataclasses.replace(d_bias, table=d_table.astype(bias.table.dtype))
        dq = dq[:, :queries, :, : q.shape[-1]]
        return dq, dk[:, :keys, :, : k.shape[-1]], dv[:, :keys, :, : v.shape[-1]], d_bias


def plans_for(
    queries: int, keys: int, width: int, dtype, bias, sizes: Sizes | None, rule: dict, **options
) -> Plans:
    """The kernels' plans. ``rule``: the fields of ``Rule`` but for lengths and blocks;
    ``options``: those of ``Plan`` but for what follows from the rest."""
    sizes = sizes or sizes_of(power_of_two(width), dtype)
    if isinstance(bias, RelativeBias):
        reach = min(bias.max_distance, max(queries, keys))
        buckets = 0
        if rule["positions"]:
            reach, buckets = bias.max_distance, bias.table.shape[-1]
        options |= {"reach": reach, "buckets": buckets}

    def plan(size: Size, square: bool = False) -> Plan:
        bq, bk = min(size.queries, power_of_two(queries)), min(size.keys, power_of_two(keys))
        bq, bk = (min(bq, bk),) * 2 if square else (bq, bk)
        size = dataclasses.replace(size, queries=bq, keys=bk)
        sloped = isinstance(bias, ALiBi)
        return Plan(Rule(queries, keys, bq, bk, **rule), size, sloped=sloped, **options)

    return Plans(plan(sizes.forward), plan(sizes.keys), plan(sizes.queries), plan(sizes.bias, True))


def power_of_two(n: int) -> int:
    """The next power of two, and enough for a product."""
    return max(LEAST, 1 << (n - 1).bit_length())


def _pad(x, lengths: dict[int, int], value: float = 0) -> Any:
    """``x`` filled up to these lengths of its axes."""
    widths = [(0, lengths.get(axis, n) - n) for axis, n in enumerate(x.shape)]
    if not any(after for _, after in widths):
        return x
    return jnp.pad(x, widths, constant_values=value)


def _padded(plans: Plans, q, k, v, marks):
    """(arrays, rows, marks) as the kernels take them: of whole blocks and widths, with the rows'
    arrays int32, [B, length] for the kernels and as given for the tables."""
    lengths = dict(zip("qk", plans.padded, strict=True))
    arrays: dict[str, Any] = {
        name: _pad(x, {1: lengths["q" if name == "q" else "k"], 3: power_of_two(x.shape[-1])})
        for name, x in (("q", q), ("k", k), ("v", v))
    }
    dropped = marks["dropout"]
    given = () if dropped is None else (("q", dropped.rows), ("k", dropped.columns))
    arrays |= {"q_drop": None, "k_drop": None}
    arrays |= {f"{name}_drop": _pad(x, {2: lengths[name]}) for name, x in given}
    marks = {name: marks[name] for name in kernel.MARKS if marks[name] is not None}
    if plans.of_forward.rule.positions:
        for name, length in (("positions", q.shape[1]), ("kv_positions", k.shape[1])):
            marks[name] = row_indices(marks.get(name), length)
    else:
        marks = {name: x for name, x in marks.items() if not name.endswith("positions")}
    marks = {name: x.astype(jnp.int32) for name, x in marks.items()}
    for name, x in marks.items():
        length = lengths["q" if name in ("segments", "positions") else "k"]
        if name.endswith("positions"):  # of padding: one that occurs
            marks[name] = jnp.pad(x, ((0, 0), (0, length - x.shape[1])), mode="edge")
        else:
            marks[name] = _pad(x, {1: length})
    rows = {
        "q_ids": marks.get("segments"),
        "k_ids": marks.get("kv_segments"),
        "k_prefix": marks.get("prefix"),
        "q_at": marks.get("positions"),
        "k_at": marks.get("kv_positions"),
    }
    if rows["q_ids"] is not None:  # a query of padding matches no key, one of padding neither
        rows["q_ids"] = jnp.where(rows["q_ids"] == 0, -1, rows["q_ids"])
    rows = {
        name: x if x is None else jnp.broadcast_to(x, (q.shape[0], x.shape[1]))
        for name, x in rows.items()
    }
    return arrays, rows, marks


def _cut(plan: Plan, marks: dict) -> dict:
    """The marks of this kernel's whole blocks."""
    rule = plan.rule
    return {
        name: x[:, : rule.padded_queries if name in ("segments", "positions") else rule.padded_keys]
        for name, x in marks.items()
    }


def _strips(plans: Plans, bias) -> dict:
    """{"strip": [N, span], "slopes": [N, 1]} of a bias, float32 in units of log2, or None each."""
    strip = slopes = None
    if isinstance(bias, RelativeBias):
        reach = plans.of_bias.reach
        strip = by_distance(bias, jnp.arange(-reach, reach + 1)) * LOG2E
    elif isinstance(bias, ALiBi):
        slopes = bias.slopes.astype(jnp.float32)[:, None] * LOG2E
    return {"strip": strip, "slopes": slopes}


def _buckets(plan: Plan, bias) -> dict:
    """{"bucket_of": the bucket of each distance of the strip, int32 [N, span]}, where the gradient
    is summed by buckets."""
    if not plan.buckets:
        return {}
    bucket = bias.buckets(jnp.arange(-plan.reach, plan.reach + 1)).astype(jnp.int32)
    return {"bucket_of": jnp.broadcast_to(bucket, (bias.table.shape[0], plan.span))}
