"""Attention by others, to measure ours against: plain XLA, cuDNN, and the kernels that JAX ships.

Each takes (q, k, v, bias, case) in the layout of our op, so that what it costs to bring them into
its own layout is counted, and raises NotImplementedError, saying what it does not serve.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels.attention.bias import materialize
from kernels.attention.cases import Case, Implementation

BLOCK = 1024  # of JAX's TPU kernels: their best at 4096, by the compiler's schedule for v5e


def _needs(case: Case, *names: str) -> None:
    """Raises unless these fields of the case have their defaults."""
    for name in names:
        if getattr(case, name) != getattr(Case(), name):
            raise NotImplementedError(f"{name}={getattr(case, name)}")


def _whole_bias(bias, case: Case):
    """[1, N, T, S], or None."""
    return None if bias is None else materialize(bias, case.length, case.length)[None]


def dot_product_attention(
    implementation: Literal["xla", "cudnn"], q, k, v, bias, case: Case
) -> jax.Array:
    """``jax.nn.dot_product_attention``; its "xla" materialises all scores: plain XLA. A bias is
    passed as the whole array."""
    whole = _whole_bias(bias, case)
    if whole is not None and implementation == "cudnn":
        whole = whole.astype(q.dtype)
    segments = case.segments()
    mask = None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None])[:, None]
        if implementation == "cudnn" and bias is None:
            raise NotImplementedError("a mask without a bias")
    window = case.window
    if window is not None:
        window = (window - 1, 0 if case.causal else window - 1)
    out: Any = jax.nn.dot_product_attention(
        q, k, v, whole, mask, is_causal=case.causal, local_window_size=window,
        implementation=implementation,
    )  # fmt: skip
    return out


def jax_flash(q, k, v, bias, case: Case) -> jax.Array:
    """``jax.experimental.pallas.ops.tpu.flash_attention``; a bias is passed as the whole array."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    _needs(case, "kv_heads", "window")
    block = math.gcd(case.length, BLOCK)
    names = (f.name for f in dataclasses.fields(flash.BlockSizes) if f.name != "block_b")
    segments = case.segments()
    whole = _whole_bias(bias, case)
    if whole is not None:
        whole = jnp.broadcast_to(whole, (case.batch, *whole.shape[1:]))
    out = flash.flash_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)),
        whole,
        None if segments is None else flash.SegmentIds(segments, segments),
        causal=case.causal,
        sm_scale=case.width**-0.5,
        block_sizes=flash.BlockSizes(block_b=1, **dict.fromkeys(names, block)),
    )
    return out.swapaxes(1, 2)


def jax_splash(q, k, v, bias, case: Case) -> jax.Array:
    """``jax.experimental.pallas.ops.tpu.splash_attention``, with its fused backward."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _needs(case, "bias", "kv_heads")
    square = (case.length, case.length)
    if case.window is not None:
        mask: Any = masks.LocalMask(
            square, (case.window - 1, 0 if case.causal else case.window - 1), 0
        )
    else:
        mask = masks.CausalMask(square) if case.causal else masks.FullMask(square)
    block = math.gcd(case.length, BLOCK)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * case.heads), block_sizes=sizes
    )
    segments = case.segments()
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    scaled = (q * case.width**-0.5).astype(q.dtype)
    out: Any = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (scaled, k, v)), segment_ids=ids)
    return out.swapaxes(1, 2)


def jax_pallas_gpu(q, k, v, bias, case: Case) -> jax.Array:
    """``jax.experimental.pallas.ops.gpu.attention``."""
    with warnings.catch_warnings():  # it is deprecated since JAX 0.11
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention

    _needs(case, "bias", "kv_heads", "window")
    return attention.mha(
        q, k, v, segment_ids=case.segments(), sm_scale=case.width**-0.5, causal=case.causal
    )


PEERS: dict[str, dict[str, Implementation]] = {  # by backend, with plain XLA first
    "cpu": {"plain XLA": functools.partial(dot_product_attention, "xla")},
    "tpu": {
        "plain XLA": functools.partial(dot_product_attention, "xla"),
        "jax flash": jax_flash,
        "jax splash": jax_splash,
    },
    "gpu": {
        "plain XLA": functools.partial(dot_product_attention, "xla"),
        "cuDNN": functools.partial(dot_product_attention, "cudnn"),
        "jax pallas": jax_pallas_gpu,
    },
}
