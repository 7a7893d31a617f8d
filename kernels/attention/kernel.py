"""What the kernels share: the rule of differentiation: their own gradients, and XLA's of those."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax

from kernels.attention import xla

MARKS = ("segments", "kv_segments", "prefix", "positions", "kv_positions")


class Kernel(Protocol):
    """One call of an implementation, in full: hashable, known when the program is traced.

    q [B, T, N, H], k and v [B, S, K, .], bias as of ``attention``; marks: the rule's arrays, by
    their names there, and "dropout", each or None; lse: the scores' log2 sums [B, N, T], a large
    positive number of a query that sees nothing.
    """

    @property
    def options(self) -> dict[str, Any]:
        """``causal``, ``window``, ``softcap`` and ``scale``."""
        ...

    def forward(self, q, k, v, bias, marks) -> tuple[jax.Array, jax.Array]:
        """(result [B, T, N, H_v], lse)."""
        ...

    def gradients(self, q, k, v, bias, marks, out, lse, g) -> tuple[Any, Any, Any, Any]:
        """Of q, k, v and bias; ``g`` is that of the result."""
        ...


def options(plan) -> dict[str, Any]:
    """``Kernel.options`` of a plan of a kernel of ours."""
    rule = {"causal": plan.rule.causal, "window": plan.rule.window}
    return rule | {"softcap": plan.softcap, "scale": plan.scale}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(kernel: Kernel, q, k, v, bias, marks):
    """The result and lse; the derivative is that of the result."""
    return kernel.forward(q, k, v, bias, marks)


def _forward(kernel: Kernel, q, k, v, bias, marks):
    # By way of the function with its rule, so that this can be differentiated again.
    results: Any = attend(kernel, q, k, v, bias, marks)
    out, lse = results
    # Heads of width 64 would be kept in rows of 128.
    return (out, lse), (q, k, v, bias, marks, out.reshape(*out.shape[:2], -1), lse)


def _backward(kernel: Kernel, saved, cotangents):
    *arguments, out, lse = saved
    g = cotangents[0]
    gradients: Any = _gradients(kernel, *arguments, out.reshape(g.shape), lse, g)
    return *gradients, None


attend.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(kernel: Kernel, q, k, v, bias, marks, out, lse, g):
    return kernel.gradients(q, k, v, bias, marks, out, lse, g)


def _gradients_forward(kernel: Kernel, q, k, v, bias, marks, out, lse, g):
    return _gradients(kernel, q, k, v, bias, marks, out, lse, g), (q, k, v, bias, marks, g)


def _gradients_backward(kernel: Kernel, saved, cotangents):
    """By XLA. The result and its sums are functions of the rest: all of the derivative goes to
    that."""
    *arguments, marks, g = saved

    def first(q, k, v, bias, g):
        def attend(q, k, v, bias):
            return xla.attention(q, k, v, bias=bias, **marks, **kernel.options)

        return jax.vjp(attend, q, k, v, bias)[1](g)

    *firsts, d_g = jax.vjp(first, *arguments, g)[1](cotangents)
    return *firsts, None, None, None, d_g


_gradients.defvjp(_gradients_forward, _gradients_backward)


def pad(x, axis: int, length: int, value: float = 0) -> Any:
    """``x`` (or None) filled up to this length of an axis."""
    if x is None or x.shape[axis] == length:
        return x
    widths = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jax.numpy.pad(x, widths, constant_values=value)
