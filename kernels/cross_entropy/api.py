"""The public function; its docstring is the contract of every implementation.

GPUs have no kernel of ours: a multiprocessor cannot keep a chunk's logits, so that a kernel would
make them twice. On an H100, for 4096 tokens of width 2048 and 32000 ids in bfloat16, that product
takes at least 0.54 ms, and the gradient of the logits, which both matrix products of the backward
pass read, 0.23 ms to write and read; the chunked XLA program (JAX 0.10.2, its fusions' operands
and results) moves 2.9 GB for all of its logits, 0.86 ms. Nothing to win, by these bounds.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal, get_args

import jax

from kernels.cross_entropy import reference, tpu, xla
from kernels.cross_entropy.base import CrossEntropy, Options
from kernels.platform import device, on_one_device, platform
from kernels.platform import platform as backend

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_tpu_interpret"]

# Float32 logits of one chunk on one device. Accelerators: a bound on memory (assumed; two or three
# arrays of this size live at once). CPU: what stays in its caches (measured: see `pick_chunk`).
LOGITS_BYTES = 512 * 2**20
LOGITS_BYTES_CPU = 16 * 2**20


def pick_chunk(
    batch: int, length: int, vocabulary: int, *, shards: int = 1, platform: str | None = None
) -> int:
    """Positions of a row to do at once: the fewest equal chunks that keep to LOGITS_BYTES.

    On a CPU smaller chunks are faster: at batch 16, length 256, width 256, vocabulary 8192 in
    float32 on 2 cores, value and gradient took 206 ms in one chunk, 175 in chunks of 32 MiB of
    logits, 148 to 168 of 16 MiB and 174 of 8 MiB (three products alone: 138; plain optax: 298).

    Args:
      shards: over how many devices the logits are cut (by rows, positions and vocabulary).
      platform: "cpu", "gpu", "tpu" that it runs on; None: that of ``kernels.platform``.
    """
    bound = LOGITS_BYTES_CPU if (platform or backend()) == "cpu" else LOGITS_BYTES
    needed = 4 * batch * length * vocabulary // max(shards, 1)
    chunks = max(1, -(-needed // bound))
    return max(1, -(-length // chunks))


def cross_entropy(
    x_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    bias: jax.Array | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocabulary: int | None = None,
    chunk: int | None = None,
    row_shards: int = 1,
    implementation: Implementation | None = None,
) -> CrossEntropy:
    """Projection to a vocabulary and weighted cross-entropy, without all logits at once.

    logits = softcap * tanh((logit_scale * x W + bias) / softcap), in float32; the product in
    x's dtype with float32 accumulation. With p = softmax(logits) and lse = logsumexp(logits),
    the loss of one target is

        (1 - label_smoothing) * -log p[target] + label_smoothing * mean(-log p) + z_loss * lse^2

    (label smoothing: Szegedy et al. 2016, section 7; z-loss: Chowdhery et al. 2022, section 5).

    Args:
      x_BTD: float [B, T, D], final hidden states.
      w_DV: float [D, V], output projection (for tied weights the embedding's transpose).
      targets_BT: int [B, T], ids below ``vocabulary``, also where the weight is 0.
      weights_BT: float [B, T]; differentiable.
      bias: float [V] or None, added to the logits.
      z_loss, label_smoothing, softcap, logit_scale: see above.
      vocabulary: how many of the V columns are ids (None: all); the rest have no probability.
      chunk: positions of every row to do at once; None: as ``pick_chunk`` says for one device. The
        kernel does no more of them than it can keep.
      row_shards: devices over which B is cut: dW is summed over them once, not once a chunk.
      implementation: "xla" (chunked), "pallas_tpu" (on one device, or within a shard_map),
        "pallas_tpu_interpret" (the same without a TPU, to test), "reference" (all logits at once;
        any dtype), or None: the kernel where it pays (see ``tpu.pays``), else XLA.

    Returns:
      CrossEntropy, a tuple. Gradients of ``total`` flow to x, W, bias and weights; those of W and
      bias are summed up in float32. The other fields have none.

    Raises:
      ValueError: an unknown implementation, a chunk below 1, row_shards that do not divide B,
        a vocabulary that does not lie in 1 to V.
      NotImplementedError: an implementation that cannot serve an argument.
    """
    if vocabulary is not None and not 1 <= vocabulary <= w_DV.shape[1]:
        raise ValueError(f"vocabulary={vocabulary} does not lie in 1 to {w_DV.shape[1]}")
    options = Options(z_loss, label_smoothing, softcap, logit_scale, vocabulary)
    if implementation == "reference":
        return reference.cross_entropy(x_BTD, w_DV, bias, targets_BT, weights_BT, options)
    if implementation not in (None, *get_args(Implementation)):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"unknown implementation {implementation!r}; give {known} or None")
    (B, T, D), V = x_BTD.shape, w_DV.shape[1]
    if row_shards < 1 or B % row_shards:
        raise ValueError(f"row_shards={row_shards} does not divide the batch, {B}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} is not valid; give at least 1, or None")
    kind = getattr(device(), "device_kind", "")
    sizes = tpu.sizes_for(kind)
    refused = tpu.unserved(x_BTD, w_DV, options, row_shards, sizes)
    chosen: str | None = implementation
    if chosen is None:
        good = refused is None and on_one_device() and tpu.pays(x_BTD, w_DV, sizes, kind)
        chosen = _chosen("pallas_tpu" if good and platform() == "tpu" else "xla", kind)
    if chosen == "xla":
        chunk, step = chunk or pick_chunk(B, T, V), None
    elif refused is not None:
        raise NotImplementedError(f"implementation={chosen!r} does not serve this {refused}")
    else:
        step = tpu.step(sizes, chosen == "pallas_tpu_interpret")
        chunk = min(chunk or T, sizes.chunk(B, T, D, V, x_BTD.dtype))
    return xla.cross_entropy(
        x_BTD, w_DV, bias, targets_BT, weights_BT, options, chunk, row_shards, step
    )


@functools.cache
def _chosen(implementation: str, kind: str) -> str:
    """Logs each choice once."""
    logging.getLogger("kernels.cross_entropy").info(
        "cross-entropy by %s on %s", implementation, kind
    )
    return implementation
