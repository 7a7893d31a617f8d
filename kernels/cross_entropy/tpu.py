"""A chunk of tokens by one Pallas kernel for TPUs, in which the logits never leave the chip.

The kernel goes over the vocabulary twice, a block at a time. The first pass makes the logits and
keeps their exponentials in VMEM, in x's dtype, each block against the greatest logit so far. The
second turns them into the gradient of the logits, block by block, and that into the two
gradients; dW is read and written once a chunk. So there are three products in all, as in the
chunked XLA program, and no array of tokens x vocabulary, in HBM.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.cross_entropy.base import Options

LANES = 128
MASKED = -1e30  # of a logit: finite, so that differences are
NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
V5E = ("TPU v5 lite", "TPU v5e")  # what JAX calls them
V6E = ("TPU v6 lite", "TPU v6e")
# Of a chunk: below them dW comes and goes slower than a v5e multiplies (2.5 x 197 TFLOP/s over
# 819 GB/s is 601 tokens); and less width than was tried.
LEAST_TOKENS = 768
LEAST_WIDTH = 768
# Above it an exponential that was kept may be zero where the cap's slope is not.
MOST_SOFTCAP = 40.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Least columns of a block, a multiple of 128; tokens, and rows of dW, that are done at a time;
    and the VMEM that a kernel may take, by which the tokens of a chunk are chosen."""

    columns: int = 256
    rows: int = 256
    depth: int = 512
    vmem_bytes: int = 52 << 20

    def block(self, vocabulary: int) -> int:
        """Columns of a block: of at most 128 blocks."""
        return max(self.columns, -(-vocabulary // LANES**2) * LANES)

    def most_tokens(self, width: int, vocabulary: int, dtype) -> int:
        """The most tokens of a chunk, a multiple of 128, so that all that is kept fits."""
        size, columns = jnp.dtype(dtype).itemsize, self.block(vocabulary)
        # W twice, dW twice coming and going, and what the compiler holds of products.
        fixed = width * columns * (2 * size + 4 * 4) + self.rows * columns * 16
        # Exponentials; x, its transpose, dx going twice and its sum; dlogits; numbers of a token,
        # each in a row of 128 lanes: five kept, six that come or go twice.
        token = -(-vocabulary // columns) * columns * size + width * (4 * size + 4)
        token += columns * size + LANES * 4 * (5 + 2 * 6)
        return max(0, self.vmem_bytes - fixed) // token // LANES * LANES

    def chunk(self, batch: int, length: int, width: int, vocabulary: int, dtype) -> int:
        """Positions of a row to do at once: equal chunks, as few as fit, in whole tiles of 128
        tokens where that is possible."""
        most = max(1, self.most_tokens(width, vocabulary, dtype) // batch)
        even = -(-length // -(-length // most))
        tile = LANES // math.gcd(LANES, batch)
        whole = -(-even // tile) * tile
        return min(whole, length) if whole <= most else even


def sizes_for(kind: str) -> Sizes:
    """Sizes for a device kind. Those with 128 MiB of VMEM may take more of it than others have."""
    return Sizes(vmem_bytes=110 << 20) if kind in (*V5E, *V6E) else Sizes()


def pays(x_BTD, w_DV, sizes: Sizes, kind: str) -> bool:
    """Whether the kernel beats the chunked XLA program, as far as can be told without a chip.

    Cycles by the compiler's schedule (libtpu 0.0.42), value and gradients of 4096 tokens in
    bfloat16, dW's conversion and transposes with them, and temporary memory:

        chip, width x vocabulary     kernel              XLA
        v5e, 2048 x 32000            13.0 M,  264 MiB    14.7 M,  500 MiB
        v5e, 768 x 32128              5.3 M,   95 MiB     5.5 M,  502 MiB
        v6e, 2048 x 32000             4.0 M,  267 MiB     4.0 M,  750 MiB
        v5p, 2048 x 32000            15.1 M,  275 MiB     6.7 M,  750 MiB

    That counts no waiting for memory. The kernel moves 793 MB a chunk at width 2048: on a v5e 0.97
    ms to 2.1 ms of work; on a v6e as long as the work takes, so that it cannot win there. On a v5p
    few tokens fit (384), and one of its two cores is idle.
    """
    batch, length, width = x_BTD.shape
    chunk = sizes.chunk(batch, length, width, w_DV.shape[1], x_BTD.dtype)
    fitting = width >= LEAST_WIDTH and batch * chunk >= LEAST_TOKENS
    return kind in V5E and x_BTD.dtype == jnp.bfloat16 and fitting


def unserved(x_BTD, w_DV, options: Options, row_shards: int, sizes: Sizes) -> str | None:
    """The argument that the kernel cannot serve, or None; arguments as of ``cross_entropy``."""
    least = -(-x_BTD.shape[0] // LANES) * LANES
    most = sizes.most_tokens(x_BTD.shape[-1], w_DV.shape[1], x_BTD.dtype)
    refused = {
        "dtype": x_BTD.dtype not in (jnp.bfloat16, jnp.float32),
        "row_shards": row_shards != 1,
        f"softcap (above {MOST_SOFTCAP:g})": (options.softcap or 0) > MOST_SOFTCAP,
        f"width and vocabulary (of {least} tokens, {most} fit the chip)": most < least,
    }
    return next((name for name, is_refused in refused.items() if is_refused), None)


@functools.cache
def step(sizes: Sizes, interpret: object = False) -> Callable:
    """What does one chunk for ``kernels.cross_entropy.xla.cross_entropy``. ``interpret``: as
    ``pallas_call`` takes it, to run where there is no TPU."""
    return functools.partial(one_chunk, sizes, interpret)


def one_chunk(sizes: Sizes, interpret, w_DV, bias_V, options: Options, with_gradient, sums, data):
    """As ``kernels.cross_entropy.xla.one_chunk``, of one shard."""
    x_ND, targets_N, weights_N = (a[0] for a in data)
    tokens = x_ND.shape[0]
    padded = -(-tokens // LANES) * LANES
    x_ND = jnp.pad(x_ND, ((0, padded - tokens), (0, 0)))
    targets_N1, weights_N1 = (
        jnp.pad(a, (0, padded - tokens))[:, None] for a in (targets_N.astype(jnp.int32), weights_N)
    )
    bias_1V = None if bias_V is None else bias_V.astype(jnp.float32)[None]
    columns = w_DV.shape[1]
    ids = options.vocabulary or columns
    plan = Plan(options, ids, sizes, sizes.block(columns), with_gradient, interpret)
    found = call(plan, x_ND, w_DV, bias_1V, targets_N1, weights_N1, *sums)
    top_N, norm_N, target_N, mean_N = (
        found[name][:tokens, 0] for name in ("top", "norm", "target", "total")
    )
    lse_N = top_N + jnp.log(norm_N)
    loss_N = lse_N - target_N
    full_N = loss_N + options.z_loss * lse_N**2
    if options.label_smoothing:
        full_N = full_N + options.label_smoothing * (target_N - mean_N / plan.vocabulary)
    tokens_1N = [a[None] for a in (full_N, loss_N, lse_N, target_N >= top_N)]
    if not with_gradient:
        return sums, (*tokens_1N, None)
    dbias_1V = found.get("dbias")
    return (found["dw"][None], dbias_1V), (*tokens_1N, found["dx"][:tokens][None])


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call of the kernel; every field is known when the program is traced."""

    options: Options
    vocabulary: int  # columns that are ids
    sizes: Sizes
    block: int  # columns of one
    with_gradient: bool
    interpret: object = False


def call(plan: Plan, x_ND, w_DV, bias_1V, targets_N1, weights_N1, dw_1DV, dbias_1V) -> dict:
    """The kernel over a grid of (passes, blocks of columns); sums are added to in place."""
    (tokens, depth), columns = x_ND.shape, w_DV.shape[1]
    size, f32 = plan.block, jnp.float32
    blocks = -(-columns // size)
    block = lambda step, j: (0, j)  # noqa: E731
    late = lambda step, j: (0, j * step)  # noqa: E731  (stays where it is in the first pass)
    once = functools.partial(
        pl.BlockSpec, index_map=lambda step, j: (0, 0), pipeline_mode=pl.Buffered(1)
    )
    whole = functools.partial(pl.BlockSpec, index_map=lambda step, j: (0, 0))
    number = whole((tokens, 1))
    shape = jax.ShapeDtypeStruct
    inputs: dict[str, Any] = {
        "x": (x_ND, once((tokens, depth))),
        "w": (w_DV, pl.BlockSpec((depth, size), block)),
        "targets": (targets_N1, number),
        "weights": (weights_N1, number),
    }
    if bias_1V is not None:
        inputs["bias"] = (bias_1V, pl.BlockSpec((1, size), block))
    outputs: dict[str, Any] = {
        name: (shape((tokens, 1), f32), number) for name in ("top", "norm", "target", "total")
    }
    lanes = pltpu.VMEM((tokens, LANES), f32)
    scratch = {"m": lanes, "l": lanes, "t": lanes, "s": lanes}
    aliases = {}
    if plan.with_gradient:
        inputs["x_t"] = (x_ND.T, once((depth, tokens)))
        sums = {"dw": (dw_1DV[0], depth), "dbias": (dbias_1V, 1)}
        for name, (x, rows) in sums.items():
            if x is not None:
                spec = pl.BlockSpec((rows, size), late)
                aliases[len(inputs)] = len(outputs)
                inputs[f"{name}_before"] = (x, spec)
                outputs[name] = (shape(x.shape, f32), spec)
        outputs["dx"] = (shape(x_ND.shape, x_ND.dtype), whole((tokens, depth)))
        scratch |= {
            "tops": lanes,
            "kept": pltpu.VMEM((blocks, tokens, size), x_ND.dtype),
            "g": pltpu.VMEM((tokens, size), x_ND.dtype),
            "dx_sum": pltpu.VMEM((tokens, depth), f32),
        }
    names = [*inputs, *outputs, *scratch]
    parameters: dict[str, Any] = {"interpret": plan.interpret}
    if not plan.interpret:
        parameters = {
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=120 << 20
            )
        }
    found = pl.pallas_call(
        functools.partial(kernel, plan, names, columns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(1 + plan.with_gradient, blocks),
            in_specs=[x[1] for x in inputs.values()],
            out_specs=[x[1] for x in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[x[0] for x in outputs.values()],
        input_output_aliases=aliases,
        name="cross_entropy",
        **parameters,
    )(*(x[0] for x in inputs.values()))
    return dict(zip(outputs, found, strict=True))


def kernel(plan: Plan, names, columns: int, *refs) -> None:
    """One block of columns in one of the passes.

    m: the greatest logit of each token so far, in every lane; after the first pass the log of the
    sum. l, t, s: sums of exponentials, of the target's logit, of all logits, spread over lanes.
    tops: in lane j what m was at block j.
    """
    ref = dict(zip(names, refs, strict=True))
    step, j = pl.program_id(0), pl.program_id(1)
    last = pl.num_programs(1) - 1
    size = plan.block
    # The block in which the ids end, and those after it, have columns to mask.
    whole = plan.vocabulary // size
    masks = [False] * (whole > 0) + [True] * (whole * size < columns)

    @pl.when((step == 0) & (j == 0))
    def _():
        ref["m"][...] = jnp.full(ref["m"].shape, MASKED, jnp.float32)
        for name in ("l", "t", "s"):
            ref[name][...] = jnp.zeros(ref[name].shape, jnp.float32)

    for masked in masks:
        here = (j >= whole) == masked

        @pl.when((step == 0) & here)
        def _(masked=masked):
            _exponentials(plan, ref, j, masked)

        if plan.with_gradient:

            @pl.when((step == 1) & here)
            def _(masked=masked):
                _gradients(plan, ref, j, masked, columns)

    @pl.when((step == 0) & (j == last))
    def _():
        ref["top"][...] = ref["m"][:, :1]
        for name, source in (("norm", "l"), ("target", "t"), ("total", "s")):
            ref[name][...] = jnp.sum(ref[source][...], axis=1, keepdims=True)
        if plan.with_gradient:
            norm = jnp.broadcast_to(ref["norm"][...], ref["m"].shape)
            ref["m"][...] += jnp.log(norm)
            ref["dx_sum"][...] = jnp.zeros(ref["dx_sum"].shape, jnp.float32)

    if plan.with_gradient:

        @pl.when((step == 1) & (j == last))
        def _():
            ref["dx"][...] = ref["dx_sum"][...].astype(ref["dx"].dtype)


def _exponentials(plan: Plan, ref, j, masked: bool) -> None:
    options, size = plan.options, plan.block
    chunks = _pieces(ref["x"].shape[0], plan.sizes.rows)

    def product(begin, end):
        return _dot(ref["x"][begin:end], ref["w"][...])

    # The next rows' product comes before these rows' exponentials, so that the two overlap.
    ahead = product(*chunks[0])
    for n, (begin, end) in enumerate(chunks):
        logits = ahead
        if n + 1 < len(chunks):
            ahead = product(*chunks[n + 1])
        rows = slice(begin, end)
        if options.logit_scale != 1:
            logits = logits * options.logit_scale
        if "bias" in ref:
            logits = logits + ref["bias"][...]
        if options.softcap is not None:
            logits = options.softcap * jnp.tanh(logits * (1 / options.softcap))
        column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        ids = column < plan.vocabulary - j * size if masked else None
        if options.label_smoothing:
            ref["s"][rows] += _fold(logits if ids is None else jnp.where(ids, logits, 0.0))
        if ids is not None:
            logits = jnp.where(ids, logits, MASKED)
        hot = column == ref["targets"][rows] - j * size
        ref["t"][rows] += _fold(jnp.where(hot, logits, 0.0))
        before = ref["m"][rows]
        top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        exponentials = jnp.exp(logits - _spread(top, size))
        ref["l"][rows] = ref["l"][rows] * jnp.exp(before - top) + _fold(exponentials)
        ref["m"][rows] = top
        if plan.with_gradient:
            lane = lax.broadcasted_iota(jnp.int32, top.shape, 1)
            ref["tops"][rows] = jnp.where(lane == j, top, ref["tops"][rows])
            ref["kept"][j, rows] = exponentials.astype(ref["kept"].dtype)


def _gradients(plan: Plan, ref, j, masked: bool, columns: int) -> None:
    """The gradient of the logits, as in ``kernels.cross_entropy.xla.one_chunk``, and from it the
    others."""
    options, size = plan.options, plan.block
    smoothing = options.label_smoothing
    w = ref["w"][...]
    if columns % size:  # beyond the last column there is anything
        column = lax.broadcasted_iota(jnp.int32, w.shape, 1)
        w = jnp.where(column < columns - j * size, w, 0).astype(w.dtype) if masked else w
    dbias = jnp.zeros((1, size), jnp.float32)
    for begin, end in _pieces(ref["x"].shape[0], plan.sizes.rows):
        rows = slice(begin, end)
        lse, tops = ref["m"][rows], ref["tops"][rows]
        lane = lax.broadcasted_iota(jnp.int32, tops.shape, 1)
        top = jnp.sum(jnp.where(lane == j, tops, 0.0), axis=1, keepdims=True)
        top = jnp.broadcast_to(top, lse.shape)
        weight = jnp.broadcast_to(ref["weights"][rows], lse.shape)
        scale = weight * jnp.exp(top - lse)
        if options.z_loss:
            scale = scale * (1 + 2 * options.z_loss * lse)
        kept = ref["kept"][j, rows].astype(jnp.float32)
        column = lax.broadcasted_iota(jnp.int32, kept.shape, 1)
        hot = column == ref["targets"][rows] - j * size
        g = kept * _spread(scale, size)
        g = g - jnp.where(hot, _spread(weight * (1 - smoothing), size), 0.0)
        if smoothing:
            g = g - _spread(weight * (smoothing / plan.vocabulary), size)
        if options.softcap is not None:
            logits = jnp.maximum(_spread(top, size) + jnp.log(kept), -options.softcap)
            g = g * (1 - jnp.square(logits * (1 / options.softcap)))
        if masked:
            g = jnp.where(column < plan.vocabulary - j * size, g, 0.0)
        dbias += jnp.sum(g, axis=0, keepdims=True) if "dbias" in ref else 0.0
        if options.logit_scale != 1:
            g = g * options.logit_scale
        g = g.astype(ref["g"].dtype)
        ref["g"][rows] = g
        ref["dx_sum"][rows] += _dot(g, w, NT)
    if "dbias" in ref:
        ref["dbias"][...] = ref["dbias_before"][...] + dbias
    for begin, end in _pieces(ref["x_t"].shape[0], plan.sizes.depth):
        new = _dot(ref["x_t"][begin:end], ref["g"][...])
        ref["dw"][begin:end] = ref["dw_before"][begin:end] + new


def _pieces(length: int, most: int) -> list[tuple[int, int]]:
    return [(at, min(at + most, length)) for at in range(0, length, most)]


def _dot(a, b, dims=NN):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _fold(x):
    """[n, columns] summed to [n, 128]."""
    total = x[:, :LANES]
    for at in range(LANES, x.shape[1], LANES):
        total = total + x[:, at : at + LANES]
    return total


def _spread(x, columns: int):
    """[n, 128], the same in every lane, as [n, columns]."""
    return jnp.tile(x, (1, columns // LANES))
