"""The public attention function: checks, defaults and the choice of implementation."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp

from kernels.attention import cudnn, gpu, reference, tpu, tuning, xla
from kernels.attention import dropout as dropouts
from kernels.attention.bias import ALiBi, RelativeBias, materialize
from kernels.attention.dropout import Dropout
from kernels.attention.rule import Positions
from kernels.platform import device, on_one_device, platform

IMPLEMENTATIONS = {
    "reference": reference.attention,
    "xla": xla.attention,
    "pallas_tpu": tpu.attention,
    "pallas_gpu": gpu.attention,
    "cudnn": cudnn.attention,
    "pallas_tpu_interpret": functools.partial(tpu.attention, interpret=True),
    "pallas_gpu_interpret": functools.partial(gpu.attention, interpret=True),
}
# Fewer queries than this leave most of a block of the kernel empty.
LEAST_QUERIES = 128


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = False,
    prefix: jax.Array | None = None,
    segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    positions: Positions = None,
    kv_positions: Positions = None,
    window: int | None = None,
    bias: RelativeBias | ALiBi | jax.Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: tuple[float, jax.Array] | Dropout | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention in which query t sees key s when

        segments[t] == kv_segments[s] != 0
        and (not causal or kv_positions[s] <= positions[t] or prefix[s])
        and (window is None or |positions[t] - kv_positions[s]| < window).

    Scores are ``softcap * tanh(scale * q.k / softcap) + bias``; they and their softmax are
    float32. A query that sees nothing gives zeros.

    Args:
      q_BTNH: queries, N heads of width H.
      k_BSKH: keys; K divides N, and each key head serves N / K query heads in a row.
      v_BSKH: values, possibly of another width, which is then that of the result.
      causal: whether order counts. Without it every key of the segment is seen.
      prefix: int or bool [B, S], nonzero where later keys may be seen too (needs ``causal``).
      segments: int [B, T]; 0 is padding. None: one segment, no padding.
      kv_segments: int [B, S]; None: those of the queries, which needs T == S.
      positions, kv_positions: int [T] or [B, T] and [S] or [B, S], row indices for order,
        window and bias, or ``Consecutive(first)``; default 0, 1, ...
      window: keys at this distance or further are not seen.
      bias: added to the scores: by distance, or an array broadcastable to [B, N, T, S].
      softcap: bounds the scores (before the bias) by its magnitude.
      scale: of the scores; default H^-0.5.
      dropout: (rate, key) of dropout on the probabilities, the same ones by every implementation,
        or what ``dropout.drawn`` makes of that.
      implementation: "xla", "reference", "pallas_tpu" and "pallas_gpu" (on one device, or by
        ``sharded_attention``), "pallas_tpu_interpret" and "pallas_gpu_interpret" (the same
        without the device, to test), "cudnn", or None for the fastest that serves the arguments.

    Returns:
      [B, T, N, H_v] in q's dtype.

    Raises:
      ValueError: shapes or arguments that do not fit each other.
      NotImplementedError: an implementation that does not exist or cannot serve an argument.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise NotImplementedError(f"implementation={implementation!r} is none of: {known}")
    if segments is not None and kv_segments is None:
        kv_segments = segments
    check(q_BTNH, k_BSKH, v_BSKH, causal, prefix, segments, kv_segments, window)
    arguments = {
        "causal": causal,
        "prefix": prefix,
        "segments": segments,
        "kv_segments": kv_segments,
        "positions": positions,
        "kv_positions": kv_positions,
        "window": window,
        "bias": bias,
        "softcap": softcap,
        "dropout": dropout,
    }
    q, k, v = q_BTNH, k_BSKH, v_BSKH
    if isinstance(dropout, tuple):
        arguments["dropout"] = dropouts.drawn(
            *dropout, q.shape[0], q.shape[2], q.shape[1], k.shape[1]
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    implementation = implementation or fastest(q, k, v, arguments)
    return IMPLEMENTATIONS[implementation](q, k, v, scale=scale, **arguments)


def shared_bias(
    bias: RelativeBias | ALiBi | None,
    queries: int,
    keys: int,
    implementation: str | None = None,
    *,
    sharded: bool = False,
) -> RelativeBias | ALiBi | jax.Array | None:
    """What to pass as ``bias`` in each of several layers that share it.

    An implementation that computes the bias inside takes it as it is. XLA is given the array, so
    that the layers share its computation, and their gradients are added up before they go to the
    table. For rows of default positions. ``sharded``: the layers call ``sharded_attention``.
    """
    inside = queries >= LEAST_QUERIES and (sharded or on_one_device())
    implementation = implementation or (_kernel() if inside else None) or "xla"
    if bias is None or implementation not in ("xla", "reference"):
        return bias
    return materialize(bias, queries, keys)[None]


def fastest(q, k, v, arguments) -> str:
    """The implementation for the default backend and these arguments."""
    backend, best = platform(), _kernel()
    if backend == "gpu" and _capability() >= (8, 0) and not cudnn.unserved(q, k, v, **arguments):
        return _chosen("cudnn", f"the backend is {backend}")
    if best is None:
        return _chosen("xla", f"the backend is {backend}")
    refused = (gpu if best == "pallas_gpu" else tpu).unserved(q, k, v, **arguments)
    if q.shape[1] < LEAST_QUERIES:
        refused = f"length, of less than {LEAST_QUERIES}"
    if not on_one_device():
        refused = "mesh: call sharded_attention"
    if refused is not None:
        return _chosen("xla", f"{best} does not serve this {refused}")
    origin = f"; {tuning.origin()}" if best == "pallas_tpu" else ""
    return _chosen(best, f"the backend is {backend}{origin}")


def _kernel() -> str | None:
    """Our kernel for the default backend: of GPUs, those that it was compiled for (Ampere, Ada,
    Hopper)."""
    backend = platform()
    if backend == "gpu":
        return "pallas_gpu" if (8, 0) <= _capability() < (10, 0) else None
    return "pallas_tpu" if backend == "tpu" else None


def _capability() -> tuple[int, ...]:
    """CUDA's compute capability of the GPUs here; (0,) of AMD's, where there is no cuDNN."""
    capability = str(getattr(device(), "compute_capability", "0"))
    return tuple(int(x) for x in capability.split(".") if x.isdigit()) or (0,)


@functools.cache
def _chosen(implementation: str, reason: str) -> str:
    """Logs each choice once."""
    logging.getLogger("kernels.attention").info("attention by %s: %s", implementation, reason)
    return implementation


def check(q, k, v, causal, prefix, segments, kv_segments, window) -> None:
    """Raises ValueError where these arguments of ``attention`` do not fit each other."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v have 4 axes each; got {q.shape}, {k.shape}, {v.shape}")
    batch, queries, heads, width = q.shape
    keys, groups = k.shape[1:3]
    if k.shape != (batch, keys, groups, width) or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    if heads % groups:
        raise ValueError(f"{groups} key heads do not divide {heads} query heads")
    if prefix is not None and not causal:
        raise ValueError("prefix means something only with causal=True")
    if kv_segments is not None and segments is None:
        raise ValueError("kv_segments without segments")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    for name, x, length in (
        ("segments", segments, queries),
        ("kv_segments", kv_segments, keys),
        ("prefix", prefix, keys),
    ):
        if x is not None and jnp.shape(x) != (batch, length):
            raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be {(batch, length)}")
