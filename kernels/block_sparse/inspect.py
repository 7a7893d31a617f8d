"""The block-sparse products' TPU kernels beside XLA's dense product, as the compiler schedules
them."""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_sparse import cases, tpu
from kernels.block_sparse.places import Places, grid_of
from kernels.inspect import Subject

__all__ = ["add_arguments", "subjects"]
PASSES = ("times", "turned", "outer")  # y, dx, dW


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases.add_arguments(
        parser, shapes=["7b"], densities=[0.25], blocks=[128], tokens=4096, dtype="bfloat16"
    )
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES, help="y, dx, dW")
    parser.add_argument(
        "--sizes", type=int, nargs=4, metavar=("TOKENS", "CHUNK", "DEPTH", "BLOCKS"),
        help="most tokens of a tile, tokens multiplied at a time, rows of blocks of a step, blocks "
        "of dW at a time; default: those of tpu.Sizes",
    )  # fmt: skip
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True)


def subjects(args: argparse.Namespace) -> list[Subject]:
    """For each shape and pass the dense product and ours; "flops" are those of what is held, so
    that "ms" over "ms to compute" of ours and of the dense one compare cycles for each block."""
    sizes = tpu.Sizes(*args.sizes) if args.sizes else tpu.Sizes()
    found = []
    for name in args.shapes:
        d_in, d_out = cases.shape_of(name)
        for which in args.passes:
            if args.dense:
                found.append(_dense(which, name, args, d_in, d_out))
            for side in args.blocks:
                for density in args.densities:
                    places = cases.balanced(d_in, d_out, (side, side), density)
                    found.append(_sparse(which, name, args, d_in, d_out, side, places, sizes))
    return found


def _dense(which: str, name: str, args, d_in: int, d_out: int) -> Subject:
    given = {"times": "xw", "turned": "gw", "outer": "xg"}[which]
    left, right = {"times": (1, 0), "turned": (1, 1), "outer": (0, 0)}[which]

    def product(a, b):
        return jax.lax.dot_general(a, b, (((left,), (right,)), ((), ())))

    shapes = {"x": (args.tokens, d_in), "g": (args.tokens, d_out), "w": (d_in, d_out)}
    arguments = [shapes[letter] for letter in given]
    return Subject(
        f"dense {which} {name}",
        product,
        lambda make: tuple(make(shape, jnp.dtype(args.dtype)) for shape in arguments),
        2.0 * args.tokens * d_in * d_out,
        jnp.dtype(args.dtype).itemsize * float(sum(a * b for a, b in shapes.values())),
    )


def _sparse(which, name, args, d_in, d_out, side: int, places: Places, sizes) -> Subject:
    high, wide = grid_of(d_in, d_out, (side, side))
    n, dtype = len(places.rows), jnp.dtype(args.dtype)
    x, g = (args.tokens, high * side), (args.tokens, wide * side)
    w, products = (n, side, side), tpu.products(sizes)
    # Places that are numpy's are constants, which the count of cycles can read.
    function, shapes = {
        "times": (functools.partial(_second, products.times, places, wide), (x, w)),
        "turned": (functools.partial(_second, products.turned, places, high), (g, w)),
        "outer": (lambda x, g: products.outer(x, g, places, (side, side), dtype), (x, g)),
    }[which]
    numbers = args.tokens * (d_in + d_out) + n * side * side
    return Subject(
        f"{which} {name}, {n} blocks of {side}, density {n / (high * wide):.3g}",
        function,
        lambda make: tuple(make(shape, dtype) for shape in shapes),
        2.0 * args.tokens * n * side * side,
        float(dtype.itemsize * numbers),
    )


def _second(product, places: Places, count: int, a, w):
    return product(a, w, places, count)


def traced(places: Places) -> Places:
    """The same places as arrays of JAX's, for programs that may not know them."""
    return Places(*(jnp.asarray(np.asarray(x)) for x in places))
