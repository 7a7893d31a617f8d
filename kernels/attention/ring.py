"""Attention whose keys go round a ring of devices (Liu et al. 2023, Ring Attention, section 3).

Each device keeps its queries and passes keys and values on; what it found so far is merged with
what it finds next by the scores' sums. Backward they go round once more, with their gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.dropout import Dropout
from kernels.attention.rule import Consecutive, row_indices

UNSEEN = 1e30  # lse of a query that sees nothing: see ``kernel.Kernel``
OF_KEYS = ("kv_segments", "prefix", "kv_positions")


@dataclasses.dataclass(frozen=True)
class Ring:
    """axis, size: of the mesh. prepare: of an implementation, as ``tpu.prepared``. options: its
    arguments that are no arrays, by name, and the rate of dropout."""

    axis: Any
    size: int
    prepare: Callable[..., tuple]
    options: tuple[tuple[str, Any], ...]
    rate: float | None = None


def attention(ring: Ring, q, k, v, bias, rows: dict, dropout: Dropout | None) -> jax.Array:
    """Within a ``shard_map``: of this device's queries, keys and rows (by their names in
    ``attention``)."""
    theirs = {name: x for name, x in rows.items() if name in OF_KEYS}
    own = {name: x for name, x in rows.items() if name not in OF_KEYS}
    if dropout is not None:
        ring = dataclasses.replace(ring, rate=dropout.rate)
        own, theirs = own | {"drop": dropout.rows}, theirs | {"drop": dropout.columns}
    out: Any = _attend(ring, q, k, v, bias, own, theirs)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, q, k, v, bias, own, theirs):
    return _forward(ring, q, k, v, bias, own, theirs)[0]


def _forward(ring: Ring, q, k, v, bias, own, theirs):
    def found(k, v, theirs, n):
        kernel, *arguments = _call(ring, q, k, v, bias, own, theirs, n)

        def nothing():
            out = jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
            return out, jnp.full((q.shape[0], q.shape[2], q.shape[1]), UNSEEN)

        out, lse = lax.cond(_visible(ring, arguments), lambda: kernel.forward(*arguments), nothing)
        return out.astype(jnp.float32), lse

    def step(carry, n):
        going, so_far = carry
        going = _on(ring, going)
        return (going, _merged(so_far, found(*going, n))), None

    start = (k, v, theirs), found(k, v, theirs, 0)
    (_, (out, lse)), _ = lax.scan(step, start, jnp.arange(1, ring.size))
    out = out.astype(q.dtype)
    return out, (q, k, v, bias, own, theirs, out, lse)


def _backward(ring: Ring, saved, g):
    gradients: Any = _gradients(ring, *saved, g)
    return *gradients, None, None


_attend.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(ring: Ring, q, k, v, bias, own, theirs, out, lse, g):
    f32 = jnp.float32

    def found(k, v, theirs, n):
        kernel, *arguments = _call(ring, q, k, v, bias, own, theirs, n)
        shapes = (q, k, v, bias)
        return lax.cond(
            _visible(ring, arguments),
            lambda: kernel.gradients(*arguments, out, lse, g),
            lambda: jax.tree.map(jnp.zeros_like, shapes),
        )

    def step(carry, n):
        (k, v, theirs, dk, dv), dq, d_bias = carry
        dq_here, dk_here, dv_here, d_bias_here = found(k, v, theirs, n)
        going = _on(ring, (k, v, theirs, dk + dk_here, dv + dv_here))
        d_bias = jax.tree.map(jnp.add, d_bias, d_bias_here)
        return (going, dq + dq_here, d_bias), None

    dq, dk, dv = (jnp.zeros(x.shape, f32) for x in (q, k, v))
    start = (k, v, theirs, dk, dv), dq, jax.tree.map(jnp.zeros_like, bias)
    ((*_, dk, dv), dq, d_bias), _ = lax.scan(step, start, jnp.arange(ring.size))
    return *(d.astype(x.dtype) for d, x in zip((dq, dk, dv), (q, k, v), strict=True)), d_bias


def _no_second(ring: Ring, *_):
    raise NotImplementedError("a ring of devices does not serve this second derivative")


_gradients.defvjp(_no_second, _no_second)


def _on(ring: Ring, tree):
    """To the next device."""
    pairs = [(n, (n + 1) % ring.size) for n in range(ring.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis, pairs), tree)


def _call(ring: Ring, q, k, v, bias, own, theirs, n):
    """(kernel, its arguments) for the keys that came here after ``n`` steps."""
    here = lax.axis_index(ring.axis)
    marks = own | {name: x for name, x in theirs.items() if name != "drop"}
    for name, x, device in (
        ("positions", q, here), ("kv_positions", k, (here - n) % ring.size)
    ):  # fmt: skip
        if name not in marks:
            marks[name] = Consecutive(device * x.shape[1], x.shape[1])
    rows = marks.pop("drop", None)
    dropout = None if ring.rate is None else Dropout(ring.rate, rows, theirs["drop"])
    return ring.prepare(q, k, v, bias=bias, dropout=dropout, **marks, **dict(ring.options))


def _visible(ring: Ring, arguments) -> jax.Array:
    """Whether any of these queries may see any of these keys."""
    q, k, _, _, marks = arguments
    options = dict(ring.options)
    query = row_indices(marks["positions"], q.shape[1])
    key = row_indices(marks["kv_positions"], k.shape[1])
    seen = jnp.bool_(True)
    if options["causal"]:
        seen = key.min() <= query.max()
        if marks["prefix"] is not None:
            seen = seen | (marks["prefix"] != 0).any()
    if options["window"] is not None:
        reach = options["window"]
        seen = seen & (key.min() - query.max() < reach) & (query.min() - key.max() < reach)
    if marks["segments"] is not None:
        segments, others = marks["segments"], marks["kv_segments"]
        seen = seen & (segments.max() > 0) & (others.max() > 0)
        lowest = [jnp.where(x == 0, x.max(), x).min() for x in (segments, others)]
        seen = seen & (lowest[0] <= others.max()) & (lowest[1] <= segments.max())
    return seen


def _merged(a, b):
    """(result [B, T, N, H], lse [B, N, T]) of two sets of keys, from those of each."""
    results, sums = zip(a, b, strict=True)
    sums = [jnp.where(x >= UNSEEN / 2, -jnp.inf, x) for x in sums]
    peak = jnp.maximum(*sums)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = [jnp.exp2(x - peak) for x in sums]
    total = weights[0] + weights[1]
    some = total > 0
    total = jnp.where(some, total, 1.0)
    shares = [(w / total).swapaxes(1, 2)[..., None] for w in weights]
    out = results[0] * shares[0] + results[1] * shares[1]
    return out, jnp.where(some, peak + jnp.log2(total), UNSEEN)
