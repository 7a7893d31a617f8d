"""Block-sparse products beside the dense one, and the density at which they break even."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.block_sparse import cases
from kernels.block_sparse.api import IMPLEMENTATIONS, block_sparse_matmul, chosen
from kernels.block_sparse.places import grid_of
from kernels.product import product
from kernels.timing import interleaved

Passes = dict[str, Callable[[], Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_cpu = jax.default_backend() == "cpu"
    cases.add_arguments(
        parser,
        shapes=["small"] if on_cpu else ["1b", "7b"],
        densities=[1.0, 0.5, 0.25, 0.125, 0.0625],
        blocks=[32, 64, 128],
        tokens=1024 if on_cpu else 8192,
        dtype="float32" if on_cpu else "bfloat16",
    )
    parser.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, help="default: what is chosen here"
    )
    parser.add_argument("--rank", type=float, help="add the low-rank product: a share of d_in")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-seconds", type=float, default=0.05)


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each shape, block and density (as many blocks in every column), and one for each
    block of where forward and backward break even.

    Times are medians in ms, of y = x W ("forward"), and of dx and dW alone ("backward"). TFLOP/s
    count what is held. "x dense" is the share of the dense product's time beside which it was
    taken. With ``--rank`` S is added to (x A) B.
    """
    found = []
    for shape in args.shapes:
        d_in, d_out = cases.shape_of(shape)
        for side in args.blocks:
            some = [_row(args, shape, d_in, d_out, side, density) for density in args.densities]
            densities = [row["density"] for row in some]
            found += some
            for label in ("forward", "backward"):
                density = break_even(densities, [row[f"{label}, x dense"] for row in some])
                even = {"shape": shape, "block": side, "density": density}
                found.append(even | {"by": f"{label} breaks even", f"{label}, x dense": 1.0})
    return found


def break_even(densities: list[float], shares: list[float]) -> float | None:
    """The greatest density up to which the share of the dense product's time lies below 1, between
    those tried on the straight line; None where it does nowhere."""
    points = sorted(zip(densities, shares, strict=True))
    if points[0][1] >= 1:
        return None
    for (low, before), (high, after) in itertools.pairwise(points):
        if after >= 1:
            return low + (high - low) * (1 - before) / (after - before)
    return points[-1][0]


def _row(args, shape: str, d_in: int, d_out: int, side: int, density: float) -> dict[str, Any]:
    places = cases.balanced(d_in, d_out, (side, side), density)
    n, (high, wide) = len(places.rows), grid_of(d_in, d_out, (side, side))
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def normal(*size):
        return jax.random.normal(next(keys), size, args.dtype)

    x, g = normal(args.tokens, d_in), normal(args.tokens, d_out)
    blocks, w = normal(n, side, side), normal(d_in, d_out)
    at = jnp.asarray(places.rows), jnp.asarray(places.columns)
    rank = round(args.rank * d_in) if args.rank else 0
    thin = (normal(d_in, rank), normal(rank, d_out)) if rank else ()

    def sparse(x, blocks, rows, columns, *thin):
        y = block_sparse_matmul(x, blocks, rows, columns, d_out, implementation=args.implementation)
        return y + product(product(x, thin[0]), thin[1]) if thin else y

    ours = _passes(sparse, x, g, blocks, *at, *thin)
    dense = _passes(product, x, g, w)
    padded = jax.ShapeDtypeStruct((args.tokens, high * side), x.dtype)
    row: dict[str, Any] = {
        "shape": shape,
        "block": side,
        "density": n / (high * wide),
        "by": args.implementation or chosen(padded, blocks, wide * side),
    }
    products = {"forward": 1, "backward": 2}
    for label, count in products.items():
        times = interleaved(
            {"ours": ours[label], "dense": dense[label]},
            rounds=args.rounds,
            round_seconds=args.round_seconds,
        )
        held = n * side * side + rank * (d_in + d_out)
        row |= {
            f"{label} ms": 1e3 * times["ours"].seconds,
            f"{label} TFLOP/s": 2e-12 * count * args.tokens * held / times["ours"].seconds,
            f"{label} ms, dense": 1e3 * times["dense"].seconds,
            f"{label}, x dense": times["ours"].seconds / times["dense"].seconds,
        }
    return row


def _passes(function, x, g, *params) -> Passes:
    """The forward pass, and the backward one without it: by what it keeps."""
    forward = jax.jit(lambda x, *params: jax.vjp(function, x, *params))
    backward = jax.jit(lambda pull, g: [d for d in pull(g) if d.dtype != jax.dtypes.float0])
    plain = jax.jit(function)
    _, pull = forward(x, *params)
    return {"forward": lambda: plain(x, *params), "backward": lambda: backward(pull, g)}
