"""The public function; its docstring is the contract of every implementation."""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from kernels.block_sparse import gpu, reference, rule, tpu, xla
from kernels.block_sparse.places import grid_of, places_of
from kernels.platform import device, on_one_device, platform

Implementation = Literal[
    "reference", "xla", "pallas_tpu", "pallas_tpu_interpret", "pallas_gpu", "pallas_gpu_interpret"
]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


def block_sparse_matmul(
    x: jax.Array,
    blocks: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    d_out: int,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """x W for a matrix W of which some blocks are held and the rest are zero.

    The work is that of the blocks that are held: of y = x W, of dx = dy W^T, and of dW, which is
    made at those blocks only.

    Args:
      x: float [..., d_in].
      blocks: float [n, block_in, block_out], n >= 1.
      rows, columns: int32 [n], where they lie in the grid of ceil(d_in / block_in) x
        ceil(d_out / block_out); distinct, in any order, and not checked. They may differ from step
        to step. Of a block at an edge that reaches beyond the matrix the entries there count for
        nothing, and have no gradient.
      d_out: columns of W.
      implementation: "xla" (runs anywhere), "pallas_tpu" (blocks whose sides are multiples of 128),
        "pallas_gpu" (powers of two), the same with "_interpret" (without the chip, to test),
        "reference" (W with its zeros; any dtype), or None: the kernel for the default backend where
        it serves the arguments, on one device or within a ``shard_map``, else XLA.

    Returns:
      [..., d_out] in x's dtype, which the products take their operands in, with sums in float32.
      Gradients flow to x and to the blocks, in each one's dtype, and can be differentiated again in
      reverse mode ("reference": in any).

    Raises:
      ValueError: shapes that do not fit, an unknown implementation.
      NotImplementedError: an implementation that cannot serve an argument.
    """
    check(x, blocks, rows, columns, d_out)
    if implementation == "reference":
        return reference.block_sparse_matmul(x, blocks, rows, columns, d_out)
    if implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {implementation!r}; give {known} or None")
    d_in, block = x.shape[-1], blocks.shape[1:]
    high, wide = grid_of(d_in, d_out, block)
    padded = x.reshape(-1, d_in)
    if high * block[0] > d_in:
        padded = jnp.pad(padded, ((0, 0), (0, high * block[0] - d_in)))
    name = implementation or chosen(padded, blocks, wide * block[1])
    matrix = rule.Matrix(high, wide, _products(name, padded, blocks, wide * block[1]))
    y: Any = rule.times(matrix, padded, blocks, places_of(rows, columns))
    return y[:, :d_out].reshape(*x.shape[:-1], d_out)


def _products(name: str, x, blocks, d_out: int) -> rule.Products:
    if name == "xla":
        return xla.PRODUCTS
    of = tpu if name.startswith("pallas_tpu") else gpu
    refused = of.unserved(x, blocks, d_out)
    if refused is not None:
        raise NotImplementedError(f"implementation={name!r} does not serve this {refused}")
    return of.products(interpret=name.endswith("_interpret"))


def chosen(x, blocks, d_out: int) -> Implementation:
    """What ``implementation=None`` means for x [T, d_in] and blocks [n, block_in, block_out] on the
    default backend. Logs each choice once."""
    backend = platform()
    if backend == "tpu":
        refused = tpu.unserved(x, blocks, d_out)
    elif backend == "gpu":
        refused = gpu.unserved(x, blocks, d_out) or gpu.unserved_device(device())
    else:
        return _logged("xla", f"there is no kernel for {backend}")
    if refused is not None:
        return _logged("xla", f"the kernel does not serve this {refused}")
    if not on_one_device():
        return _logged("xla", "XLA cuts the program over several devices, and cannot cut a kernel")
    return _logged(f"pallas_{backend}", f"the backend is {backend}")  # type: ignore[arg-type]


@functools.cache
def _logged(implementation: Implementation, reason: str) -> Implementation:
    logging.getLogger("kernels.block_sparse").info(
        "block-sparse products by %s: %s", implementation, reason
    )
    return implementation


def check(x, blocks, rows, columns, d_out: int) -> None:
    """Raises ValueError where the arguments do not fit one another."""
    if blocks.ndim != 3 or 0 in blocks.shape:
        raise ValueError(f"blocks{list(blocks.shape)} are not [n, block_in, block_out]")
    if rows.shape != blocks.shape[:1] or columns.shape != blocks.shape[:1]:
        raise ValueError(
            f"rows{list(rows.shape)} and columns{list(columns.shape)} do not fit "
            f"{blocks.shape[0]} blocks"
        )
    high, wide = grid_of(x.shape[-1], d_out, blocks.shape[1:])
    if blocks.shape[0] > high * wide:
        raise ValueError(
            f"{blocks.shape[0]} blocks of {blocks.shape[1]} x {blocks.shape[2]} do not fit a "
            f"matrix of {x.shape[-1]} x {d_out}"
        )
