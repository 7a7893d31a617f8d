"""A call of attention that is timed or inspected: its shapes, its arguments, its work."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import api, blocks
from kernels.attention.bias import ALiBi, RelativeBias

BUCKETS, MAX_DISTANCE = 32, 128  # T5's
# (q, k, v, bias, case) -> result; raises NotImplementedError, saying what it does not serve
Implementation = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """Self-attention of [batch, length, heads, width]."""

    batch: int = 4
    heads: int = 16
    kv_heads: int | None = None  # None: as many as heads
    length: int = 4096
    width: int = 128
    dtype: str = "bfloat16"
    causal: bool = True
    window: int | None = None
    bias: str | None = None  # "t5" (32 buckets to distance 128), "alibi" or None
    documents: int = 1  # of equal length in a row; above 1 with segments
    backward: bool = False

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    def arguments(self, make: Callable[[tuple[int, ...], Any], Any]) -> tuple[Any, ...]:
        """(q, k, v, bias table or None, gradient of the result), made by ``make(shape, dtype)``."""
        shape = (self.batch, self.length, self.heads, self.width)
        key = (self.batch, self.length, self.groups, self.width)
        table = {"t5": (self.heads, BUCKETS), "alibi": (self.heads,)}.get(self.bias or "")
        table = None if table is None else make(table, jnp.float32)
        dtype = jnp.dtype(self.dtype)
        return make(shape, dtype), make(key, dtype), make(key, dtype), table, make(shape, dtype)

    def bias_of(self, table) -> RelativeBias | ALiBi | None:
        if self.bias == "t5":
            return RelativeBias(table, MAX_DISTANCE, bidirectional=not self.causal)
        return ALiBi(table) if self.bias == "alibi" else None

    def segments(self) -> jax.Array | None:
        """int32 [batch, length], or None of one document."""
        if self.documents == 1:
            return None
        row = 1 + np.arange(self.length) * self.documents // self.length
        return jnp.broadcast_to(jnp.asarray(row, jnp.int32), (self.batch, self.length))

    def pairs(self) -> int:
        """Pairs of query and key that the rule leaves, of one row and head."""
        rule = blocks.Rule(
            self.length, self.length, 1, 1, causal=self.causal, window=self.window
        )  # fmt: skip
        document = self.length // self.documents
        reach = document if rule.window is None else min(rule.window, document)
        before = reach * document - reach * (reach - 1) // 2  # with the query itself
        return self.documents * (before if self.causal else 2 * before - document)

    def flops(self) -> float:
        """Floating-point operations: two products of the pairs that the rule leaves forward, five
        more backward (the scores again, and one for each of dp, dv, dk and dq)."""
        products = 7 if self.backward else 2
        return products * 2.0 * self.batch * self.heads * self.width * self.pairs()

    def bytes(self) -> float:
        """The least that has to move: every argument and result once."""
        size = jnp.dtype(self.dtype).itemsize
        row = self.batch * self.length * self.width * size
        queries, keys = row * self.heads, row * self.groups
        forward = 2 * queries + 2 * keys
        return forward if not self.backward else 4 * queries + 4 * keys

    def function(self, implementation: Implementation) -> Callable[..., Any]:
        """A function of ``arguments``: the result, and with ``backward`` all gradients."""

        def attend(q, k, v, table):
            return implementation(q, k, v, self.bias_of(table), self)

        def run(q, k, v, table, g):
            if not self.backward:
                return attend(q, k, v, table)
            out, pull = jax.vjp(attend, q, k, v, table)
            return out, pull(g)

        return run


def random_argument(seed: int = 0) -> Callable[[tuple[int, ...], Any], jax.Array]:
    """A ``make`` of ``Case.arguments``: normal values."""
    keys: Iterator[jax.Array] = iter(jax.random.split(jax.random.key(seed), 8))
    return lambda shape, dtype: jax.random.normal(next(keys), shape, dtype)


def ours(name: str) -> Implementation:
    """Our op by the implementation of this name."""

    def attend(q, k, v, bias, case: Case):
        return api.attention(
            q, k, v, causal=case.causal, window=case.window, segments=case.segments(), bias=bias,
            implementation=name,
        )  # fmt: skip

    return attend


def add_arguments(parser: argparse.ArgumentParser, default: Case) -> None:
    """The options that make a ``Case``, but for its length and ``backward``."""
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--heads", type=int, default=default.heads)
    parser.add_argument("--kv-heads", type=int, help="key heads; default: as many as heads")
    parser.add_argument("--width", type=int, default=default.width, help="of a head")
    parser.add_argument("--dtype", default=default.dtype, choices=("bfloat16", "float32"))
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=default.causal)
    parser.add_argument("--window", type=int, help="how far is seen; default: all")
    parser.add_argument("--bias", choices=("t5", "alibi"))
    parser.add_argument("--documents", type=int, default=1, help="packed in a row, equally long")


def case_of(args: argparse.Namespace, **changes: Any) -> Case:
    names = {f.name for f in dataclasses.fields(Case)}
    return Case(**{n: x for n, x in vars(args).items() if n in names} | changes)
