"""The sparse-plus-low-rank product beside the dense and the low-rank one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.low_rank_sparse.api import Implementation, low_rank_sparse
from kernels.low_rank_sparse.support import held_shape
from kernels.product import product
from kernels.timing import interleaved

Case = tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]  # function of x and of parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--out", type=int, help="width of the result; default: that of x")
    parser.add_argument(
        "--ranks", type=float, nargs="+", default=[128, 0.25], help="below 1: share of the width"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--group", type=int, default=32, help="one entry of so many is held")
    parser.add_argument("--dtype", default="float32", help="of x; parameters are float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-seconds", type=float, default=0.3)
    parser.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True)


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each width, rank and way to hold the matrix; the dense one is the measure.

    Times are medians in ms; "x dense" is the ratio of medians, "x dense, low" that of the lower
    quartiles, which other work on the machine disturbs less, and "x dense, operations" what
    counting gives. Forward and backward are two programs, as in a model whose layers are scanned:
    nothing but what the backward pass keeps ("kept MiB", x included) goes from one to the other.
    """
    found = []
    for width in args.widths:
        for rank in args.ranks:
            whole = round(rank * width) if rank < 1 else round(rank)
            found += _rows(args, width, args.out or width, whole)
    return found


def _rows(args, d_in: int, d_out: int, rank: int) -> list[dict[str, Any]]:
    x, g, cases = _cases(args, d_in, d_out, rank)
    passes = {name: _passes(function, x, g, *params) for name, (function, params) in cases.items()}
    options = {"rounds": args.rounds, "round_seconds": args.round_seconds}
    forward = interleaved({name: one for name, (one, _, _) in passes.items()}, **options)
    both = interleaved({name: two for name, (_, two, _) in passes.items()}, **options)
    # Products of tokens with the matrix and, where it is formed, of the factors with one another.
    dense, formed = 2 * args.tokens * d_in * d_out, 2 * rank * d_in * d_out
    factored = 2 * args.tokens * rank * (d_in + d_out)
    found = []
    for name in cases:
        if name == "dense":
            counted = (1.0, 1.0)
        elif name == "low rank":
            counted = (factored / dense, factored / dense)
        else:
            counted = (1 + formed / dense, 1 + 4 * formed / (3 * dense))
        row = {"d_in": d_in, "d_out": d_out, "rank": rank, "tokens": args.tokens, "weight": name}
        for label, times, operations in zip(
            ("forward", "forward + backward"), (forward, both), counted, strict=True
        ):
            ours, measure = times[name], times["dense"]
            row |= {
                f"{label} ms": 1e3 * ours.seconds,
                f"{label}, x dense": ours.seconds / measure.seconds,
                f"{label}, x dense, low": ours.low / measure.low,
                f"{label}, x dense, operations": operations,
            }
        found.append(row | {"kept MiB": passes[name][2] / 2**20})
    return found


def _cases(args, d_in: int, d_out: int, rank: int) -> tuple[jax.Array, jax.Array, dict[str, Case]]:
    """x [T, d_in], the cotangent [T, d_out], and the cases by name."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype="float32"):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    w, a, b = normal(d_in, d_out), normal(d_in, rank), normal(rank, d_out)
    shape = held_shape(d_in, d_out, args.group)
    width = np.minimum(args.group, d_out - args.group * np.arange(shape[1]))
    places = jnp.asarray(rng.integers(0, width, shape), jnp.uint8)
    count = shape[0] * shape[1]
    numbers = jnp.asarray(np.sort(rng.choice(d_in * d_out, count, replace=False)), jnp.int32)
    grouped, anywhere = normal(*shape), normal(count)

    def case(implementation: Implementation, group: int | None) -> Case:
        def function(x, a, b, values, indices):
            return low_rank_sparse(
                x, a, b, values, indices, scale=0.25, group=group, implementation=implementation
            )

        held = (anywhere, numbers) if group is None else (grouped, places)
        return function, (a, b, *held)

    cases: dict[str, Case] = {
        "dense": (product, (w,)),
        "low rank": (lambda x, a, b: product(product(x, a), b), (a, b)),
        "xla, grouped": case("xla", args.group),
        "xla, uniform": case("xla", None),
    }
    if args.reference:
        cases["reference, grouped"] = case("reference", args.group)
        cases["reference, uniform"] = case("reference", None)
    x, g = (normal(args.tokens, d, dtype=args.dtype) for d in (d_in, d_out))
    return x, g, cases


def _passes(
    function, x, g, *params
) -> tuple[Callable[[], jax.Array], Callable[[], tuple[jax.Array, ...]], int]:
    """(the forward pass, both passes, bytes kept between them)."""
    forward = jax.jit(lambda x, *params: jax.vjp(function, x, *params))
    backward = jax.jit(lambda pull, g: pull(g))
    _, kept = jax.eval_shape(forward, x, *params)

    def both():
        _, pull = forward(x, *params)
        # Gradients of integers are no arrays to wait for.
        return tuple(d for d in backward(pull, g) if d.dtype != jax.dtypes.float0)

    return (
        lambda: forward(x, *params)[0],
        both,
        sum(k.size * k.dtype.itemsize for k in jax.tree.leaves(kept)),
    )
