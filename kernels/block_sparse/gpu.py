"""Pallas kernels for NVIDIA GPUs, lowered by Triton: a program for each tile of tokens and column
of blocks, which goes through that column's blocks.

Triton has no scalar prefetch: places and order are plain arrays in memory, of which a program reads
an entry before it reads a block. A lowering for newer chips alone (Mosaic GPU) would be one more
set of ``Products``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels.block_sparse.places import Places
from kernels.block_sparse.rule import Products

NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
PROGRAMS = 512  # of dW's kernel at least, where there are tokens enough: four a multiprocessor
SIDES = (16, 32, 64, 128)  # of a block


@dataclasses.dataclass(frozen=True)
class Size:
    """Tokens of a tile, and how much of a sum is taken at a time, both powers of two; warps of a
    program, and how many loads are in flight."""

    tokens: int
    depth: int
    warps: int = 4
    stages: int = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the kernel for the two products with W, and of that for dW."""

    times: Size
    outer: Size


def sizes_of(block: tuple[int, int], dtype) -> Sizes:
    """For blocks of these sides. By what ptxas 12.9 says for compute capabilities 8.0 and 9.0 (see
    kernels/README.md); no time was measured."""
    if dtype == jnp.float32:
        return Sizes(Size(64, 32, 8, 2), Size(32, 32, 8, 2))
    wide = max(block) >= 128
    return Sizes(Size(128, 64, 8 if wide else 4), Size(64, 64, 8 if wide else 4))


def unserved(x, blocks, d_out: int) -> str | None:
    """The argument that these kernels cannot serve, or None."""
    del d_out
    refused = {
        "dtype": x.dtype not in (jnp.bfloat16, jnp.float32),
        "block (its sides are not of 16, 32, 64, 128)": any(
            b not in SIDES for b in blocks.shape[1:]
        ),
    }
    return next((name for name, is_refused in refused.items() if is_refused), None)


def unserved_device(device) -> str | None:
    """What is not of the devices that the kernels were compiled for: Ampere, Ada, Hopper."""
    capability = str(getattr(device, "compute_capability", "0"))
    numbers = tuple(int(x) for x in capability.split(".") if x.isdigit()) or (0,)
    return None if (8, 0) <= numbers < (10, 0) else f"device (of capability {capability})"


def products(sizes: Sizes | None = None, interpret: bool = False) -> Products:
    """``sizes``: None for ``sizes_of``; ``interpret``: to run where there is no GPU."""

    def times(x, blocks, places, columns):
        size = (sizes or sizes_of(blocks.shape[1:], x.dtype)).times
        return _times(size, interpret, x, blocks, places, columns, turned=False)

    def turned(g, blocks, places, rows):
        size = (sizes or sizes_of(blocks.shape[1:], g.dtype)).times
        return _times(size, interpret, g, blocks, places.turned, rows, turned=True)

    def outer(x, g, places, block, dtype):
        size = (sizes or sizes_of(block, x.dtype)).outer
        return _outer(size, interpret, x, g, places, block, dtype)

    return Products(times, turned, outer)


def _times(size: Size, interpret, x, blocks, places: Places, columns: int, *, turned: bool):
    """x W, or x W^T where the places are those of W^T."""
    tokens, x = x.shape[0], _padded(x, size.tokens)
    edges = jnp.searchsorted(
        places.columns[places.by_column],
        jnp.arange(columns + 1, dtype=jnp.int32),
        method="compare_all",
    ).astype(jnp.int32)
    bi, bo = blocks.shape[1:][:: -1 if turned else 1]
    found = pl.pallas_call(
        functools.partial(_times_kernel, size, interpret, (bi, bo), turned),
        grid=(columns, x.shape[0] // size.tokens),
        in_specs=[
            *(_all(a) for a in (edges, places.rows, places.by_column)),
            pl.BlockSpec((size.tokens, x.shape[1]), lambda c, t: (t, 0)),
            _all(blocks),
        ],
        out_specs=pl.BlockSpec((size.tokens, bo), lambda c, t: (t, c)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns * bo), x.dtype),
        name="block_sparse_turned" if turned else "block_sparse_times",
        **_parameters(size, interpret),
    )(edges, places.rows, places.by_column, x, blocks)
    return found[:tokens]


def _times_kernel(size: Size, interpret, block, turned: bool, edges, rows, order, x, w, y) -> None:
    """A tile of tokens and a column of W (W^T). Of a block ``depth`` rows are taken at a time."""
    (bi, bo), c = block, pl.program_id(0)
    depth = min(size.depth, bi)
    parts = bi // depth

    def add(p, acc):
        n = order[p // parts]
        begin = (p % parts) * depth
        some = x[:, pl.ds(rows[n] * bi + begin, depth)]
        if turned:
            return acc + _dot(some, w[n, :, pl.ds(begin, depth)], interpret, NT)
        return acc + _dot(some, w[n, pl.ds(begin, depth), :], interpret, NN)

    acc = jnp.zeros((size.tokens, bo), jnp.float32)
    acc = lax.fori_loop(edges[c] * parts, edges[c + 1] * parts, add, acc)
    y[...] = acc.astype(y.dtype)


def _outer(size: Size, interpret, x, g, places: Places, block: tuple[int, int], dtype):
    """Each program sums over a share of the tokens: few blocks would leave a GPU idle."""
    n = places.rows.shape[0]
    shares = max(1, min(PROGRAMS // n, x.shape[0] // (8 * size.tokens)))
    x, g = (_padded(a, size.tokens * shares) for a in (x, g))
    share = x.shape[0] // shares
    out = jax.ShapeDtypeStruct((shares, n, *block), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_outer_kernel, size, interpret, block, share),
        grid=(n, shares),
        in_specs=[_all(places.rows), _all(places.columns), _all(places.by_column)]
        + [pl.BlockSpec((share, a.shape[1]), lambda p, s: (s, 0)) for a in (x, g)],
        out_specs=_all(out),
        out_shape=out,
        name="block_sparse_outer",
        **_parameters(size, interpret),
    )(places.rows, places.columns, places.by_column, x, g)
    return found.sum(0).astype(dtype)


def _outer_kernel(size: Size, interpret, block, share, rows, columns, order, x, g, out) -> None:
    # In the order of columns neighbouring programs read the same part of g.
    (bi, bo), n = block, order[pl.program_id(0)]
    row, column = rows[n] * bi, columns[n] * bo

    def add(t, acc):
        tokens = pl.ds(t * size.tokens, size.tokens)
        return acc + _dot(x[tokens, pl.ds(row, bi)], g[tokens, pl.ds(column, bo)], interpret, TN)

    acc = jnp.zeros((bi, bo), jnp.float32)
    out[pl.program_id(1), n] = lax.fori_loop(0, share // size.tokens, add, acc)


def _dot(a, b, interpret, dims):
    """Into float32, whose operands are split in three of TF32 each: three products keep 21 bits."""
    precision: Any = None
    if a.dtype == jnp.float32:
        exact = lax.Precision.HIGHEST
        precision = exact if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _all(a) -> pl.BlockSpec:
    """All of an array, of which a program reads what it needs."""
    return pl.BlockSpec(a.shape, lambda *_: (0,) * a.ndim)


def _padded(x, tokens: int):
    rest = -x.shape[0] % tokens
    return jnp.pad(x, ((0, rest), (0, 0))) if rest else x


def _parameters(size: Size, interpret: bool) -> dict:
    if interpret:
        return {"interpret": True}
    return {"compiler_params": triton.CompilerParams(num_warps=size.warps, num_stages=size.stages)}
