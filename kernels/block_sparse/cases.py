"""Shapes, supports and options of the benchmark and of the static costs."""

from __future__ import annotations

import argparse

import numpy as np

from kernels.block_sparse.places import Places, grid_of, places_of

# The MLP's first matrices (Touvron et al. 2023; SLTrain's 1B), and one for a CPU in seconds.
SHAPES = {"1b": (2048, 5461), "7b": (4096, 11008), "small": (1024, 2048)}


def add_arguments(
    parser: argparse.ArgumentParser, *, shapes, densities, blocks, tokens, dtype
) -> None:
    known = ", ".join(f"{name} is {i} x {o}" for name, (i, o) in SHAPES.items())
    parser.add_argument("--shapes", nargs="+", default=shapes, help=f"WIDTHxWIDTH, or {known}")
    parser.add_argument("--densities", type=float, nargs="+", default=densities)
    parser.add_argument("--blocks", type=int, nargs="+", default=blocks, help="sides of blocks")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--dtype", default=dtype)


def shape_of(name: str) -> tuple[int, int]:
    """(d_in, d_out) of a shape's name, or of "512x2048". Raises ValueError."""
    if name in SHAPES:
        return SHAPES[name]
    try:
        d_in, d_out = (int(n) for n in name.split("x"))
    except ValueError:
        raise ValueError(f"{name!r} is none of {', '.join(SHAPES)} and no 512x2048") from None
    return d_in, d_out


def balanced(d_in: int, d_out: int, block: tuple[int, int], density: float) -> Places:
    """Places in numpy, as many in every column of blocks, drawn at random."""
    high, wide = grid_of(d_in, d_out, block)
    count = max(1, round(density * high))
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.permutation(high)[:count]) for _ in range(wide)]
    columns = np.repeat(np.arange(wide, dtype=np.int32), count)
    return places_of(np.concatenate(rows).astype(np.int32), columns)
