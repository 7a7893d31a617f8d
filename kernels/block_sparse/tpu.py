"""Pallas kernels for TPUs: a tile of tokens stays in the chip's memory, whole, while the blocks go
by, several of a column at a time.

Which blocks come, and what parts of the tile they meet, is read from tables that the chip has
before the kernel starts (scalar prefetch). A block is used for up to 2048 tokens once it is there,
so that the matrix units work where a product of one block for a few tokens would wait for memory.

Both sides of a block are multiples of the 128 that a matrix unit has: smaller blocks would leave
most of it idle, and their parts of x would have to be shifted across lanes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import tuning
from kernels.block_sparse.places import Places, Steps, in_a_step, steps_of
from kernels.block_sparse.rule import Products

LANES = 128
UNROLL = 16  # blocks of dW that are made side by side, to hide one's latency behind others'
NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
OF_KERNEL, OF_BUFFERS = 25 / 32, 9 / 16  # of a core's memory: what may be asked, is planned


@dataclasses.dataclass(frozen=True)
class Sizes:
    """tokens: most of a tile. chunk: of them that are multiplied at a time. depth: rows of blocks
    of a step, in all. blocks: most that the gradient of W sums up at a time."""

    tokens: int = 2048
    chunk: int = 256
    depth: int = 1024
    blocks: int = 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call, of T tokens: of a tile, and which of the two products with W."""

    tokens: int
    sizes: Sizes
    turned: bool = False
    interpret: Any = False


def unserved(x, blocks, d_out: int) -> str | None:
    """The argument that these kernels cannot serve, or None; x [T, d_in], blocks [n, bi, bo]."""
    d_in, size = x.shape[1], x.dtype.itemsize
    refused = {
        "dtype": x.dtype not in (jnp.bfloat16, jnp.float32),
        "block (its sides are no multiples of 128)": any(b % LANES for b in blocks.shape[1:]),
        "width (a tile of tokens does not fit the chip)": 2 * LANES * size * (d_in + d_out)
        > OF_BUFFERS * tuning.chip().vmem / 2,
        "number of blocks": blocks.shape[0] > 2**14,
    }
    return next((name for name, is_refused in refused.items() if is_refused), None)


def products(sizes: Sizes = Sizes(), interpret: Any = False) -> Products:
    """``interpret``: as ``pallas_call`` takes it, to run where there is no TPU."""

    def times(x, blocks, places, columns):
        return _times(Plan(0, sizes, False, interpret), x, blocks, places, columns)

    def turned(g, blocks, places, rows):
        return _times(Plan(0, sizes, True, interpret), g, blocks, places.turned, rows)

    def outer(x, g, places, block, dtype):
        return _outer(Plan(0, sizes, False, interpret), x, g, places, block, dtype)

    return Products(times, turned, outer)


def _times(plan: Plan, x, blocks, places: Places, columns: int) -> jax.Array:
    bi, bo = blocks.shape[1:][:: -1 if plan.turned else 1]
    each = in_a_step(blocks.shape[0], columns, bi, plan.sizes.depth)
    steps = steps_of(places, columns, each)
    tokens, x = x.shape[0], _whole(x, 0)
    fixed = each * bi * bo * 2 * x.dtype.itemsize
    token = 2 * x.dtype.itemsize * (x.shape[1] + bo) + 4 * bo
    plan = dataclasses.replace(plan, tokens=_tile(plan, x.shape[0], fixed, token))
    return call_times(plan, x, blocks, places.rows, steps, columns)[:tokens]


def call_times(plan: Plan, x, blocks, rows, steps: Steps, columns: int) -> jax.Array:
    """x [T, d_in] W (W^T where the plan is turned) for T a multiple of 128; ``rows`` of W's blocks
    (columns), and steps of its columns (rows)."""
    bi, bo = blocks.shape[1:][:: -1 if plan.turned else 1]
    each, tile = steps.ids.shape[1], plan.tokens
    xp: Any = np if isinstance(steps.ids, np.ndarray) else jnp
    # Of a step how many blocks it holds, then where in x their rows are.
    words = xp.concatenate([steps.held[:, None], rows[steps.ids] * bi], axis=1)
    tables = (steps.ends, words.reshape(-1), steps.ids.reshape(-1))
    return pl.pallas_call(
        functools.partial(_times_kernel, plan, each, (bi, bo)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(pl.cdiv(x.shape[0], tile), columns),
            in_specs=[
                pl.BlockSpec((tile, x.shape[1]), lambda t, c, *_: (t, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((tile, bo), lambda t, c, *_: (t, c)),
            scratch_shapes=[
                pltpu.VMEM((tile, bo), jnp.float32),
                pltpu.VMEM((2, each, *blocks.shape[1:]), x.dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns * bo), x.dtype),
        name="block_sparse_turned" if plan.turned else "block_sparse_times",
        **_parameters(plan),
    )(*tables, x, blocks)


def _times_kernel(plan, each, block, ends, words, ids, x, blocks, y, acc, ws, arrived) -> None:
    """A column of blocks for a tile of tokens: its steps lie before ``ends``. While the blocks of
    one step are multiplied, those of the next one come, of the next column where there is none."""
    (bi, _), c = block, pl.program_id(1)
    begin, end = jnp.where(c == 0, 0, ends[jnp.maximum(c - 1, 0)]), ends[c]
    last = pl.num_programs(1) - 1

    def fetch(s, slot):
        for k in range(each):
            pltpu.make_async_copy(blocks.at[ids[s * each + k]], ws.at[slot, k], arrived).start()

    def wait(slot):  # for all that come for a step at once
        pltpu.make_async_copy(ws.at[slot], ws.at[slot], arrived).wait()

    def multiply(s, held, count: int, masked: bool):
        def part(k, rows):
            return x[rows, pl.ds(pl.multiple_of(words[s * (each + 1) + 1 + k], bi), bi)]

        # Here, and not before the branch, the fetching costs no cycles of its own.
        fetch(jnp.minimum(s + 1, ends[last] - 1), (s + 1) % 2)
        w = [ws[s % 2, k] for k in range(count)]
        if masked:
            w = [jnp.where(k < held, w, 0) for k, w in enumerate(w)]
        w = jnp.concatenate(w, axis=1 if plan.turned else 0)
        for start in range(0, plan.tokens, plan.sizes.chunk):
            rows = slice(start, start + plan.sizes.chunk)
            parts = jnp.concatenate([part(k, rows) for k in range(count)], axis=1)
            new = _dot(plan, parts, w, NT if plan.turned else NN)
            acc[rows] = jnp.where(s == begin, 0.0, acc[rows]) + new

    @pl.when(c == 0)
    def _():
        fetch(0, 0)

    def step(s, _):
        wait(s % 2)
        held, half = words[s * (each + 1)], each // 2
        pl.when(held == each)(lambda: multiply(s, held, each, False))
        if each > 1:
            pl.when((held < each) & (held > half))(lambda: multiply(s, held, each, True))
            pl.when(held <= half)(lambda: multiply(s, held, half, True))

    @pl.when(begin == end)
    def _():
        acc[...] = jnp.zeros_like(acc)

    lax.fori_loop(begin, end, step, None)
    y[...] = acc[...].astype(y.dtype)

    @pl.when(c == last)  # what the last step fetched for none
    def _():
        wait(ends[last] % 2)


def _outer(plan: Plan, x, g, places: Places, block: tuple[int, int], dtype) -> jax.Array:
    n = places.rows.shape[0]
    x_t, g = _whole(x, 0).T, _whole(g, 0)
    tokens, size = g.shape[0], x.dtype.itemsize
    # Two tiles of tokens and the sums, which are float32 and lie there twice, share the memory.
    sums, token = 2 * 4 * block[0] * block[1], 2 * size * (x_t.shape[0] + g.shape[1])
    room = OF_BUFFERS * tuning.chip().vmem
    most = max(1, min(n, plan.sizes.blocks, int(room / 2 / sums)))
    each = -(-n // -(-n // most))
    tile = _tile(plan, tokens, each * sums, token)
    while tokens % tile:
        tile //= 2
    plan = dataclasses.replace(plan, tokens=tile)
    return call_outer(plan, x_t, g, places, block, each)[:n].astype(dtype)


def call_outer(plan: Plan, x_t, g, places: Places, block: tuple[int, int], each: int) -> jax.Array:
    """x^T g at the blocks, float32, from x^T [d_in, T] and g [T, d_out], of whole tiles; more of
    them, where ``each`` does not divide their number."""
    (bi, bo), tile = block, plan.tokens
    xp = np if isinstance(places.rows, np.ndarray) else jnp
    more = (0, -places.rows.shape[0] % each)
    rows, columns = (xp.pad(a, more, mode="edge") for a in (places.rows, places.columns))
    n = rows.shape[0]
    return pl.pallas_call(
        functools.partial(_outer_kernel, plan, each, block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(n // each, g.shape[0] // tile),
            in_specs=[
                pl.BlockSpec((x_t.shape[0], tile), lambda i, t, *_: (0, t)),
                pl.BlockSpec((tile, g.shape[1]), lambda i, t, *_: (t, 0)),
            ],
            out_specs=pl.BlockSpec((each, bi, bo), lambda i, t, *_: (i, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((n, bi, bo), jnp.float32),
        name="block_sparse_outer",
        **_parameters(plan),
    )(rows * bi, columns * bo, x_t, g)


def _outer_kernel(plan: Plan, each: int, block, rows, columns, x_t, g, out) -> None:
    (bi, bo), i, t = block, pl.program_id(0), pl.program_id(1)

    @pl.when(t == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    def one(k):
        row = pl.multiple_of(rows[i * each + k], bi)
        column = pl.multiple_of(columns[i * each + k], bo)
        out[k] += _dot(plan, x_t[pl.ds(row, bi), :], g[:, pl.ds(column, bo)])

    def some(turn, _):
        for k in range(UNROLL):
            one(turn * UNROLL + k)

    whole = each // UNROLL  # (by hand: JAX 0.7's kernels unroll a loop wholly or not at all)
    lax.fori_loop(0, whole, some, None)
    for k in range(whole * UNROLL, each):
        one(k)


def _tile(plan: Plan, tokens: int, fixed: int, token: int) -> int:
    """Tokens of a tile: a power of two from 128 on, no more than there are or fit."""
    room = OF_BUFFERS * tuning.chip().vmem - fixed
    most = min(plan.sizes.tokens, max(LANES, int(room / token)), tokens)
    return 1 << (most.bit_length() - 1)


def _whole(x, axis: int):
    """x with zeros up to a multiple of 128 of this axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, widths) if widths[axis][1] else x


def _dot(plan: Plan, a, b, dims=NN):
    if plan.interpret:  # CPUs have no product of bfloat16 into float32 at every level of XLA's
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _parameters(plan: Plan) -> dict:
    if plan.interpret:
        return {"interpret": plan.interpret}
    parameters = pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=int(OF_KERNEL * tuning.chip().vmem),
        disable_bounds_checks=True,
    )
    return {"compiler_params": parameters}
