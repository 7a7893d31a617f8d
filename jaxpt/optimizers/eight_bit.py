"""Moments in 8 bits (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization").

A block of consecutive entries of a row shares a scale; an entry is a code of dynamic tree
quantisation (section 1.2, figure 2), which spends its bits on the magnitude's decade first. With a
sign, K = 0, ..., 6 and 2^K values in the decade that ends at 10^(K - 6):

    10^(K - 6) (0.1 + 0.9 (j + 1/2) / 2^K),  j = 0, ..., 2^K - 1

and 0. Without one, twice as many. The scale is such that the block's largest entry is a code. All
of it is arithmetic on the entry, no table: it fuses with the rule's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.optimizers.rules import Rule

BLOCK = 256  # entries of a row that share a scale
LEAST = 4096  # arrays of fewer entries stay as they are
# Fields of optimizers' states that are moments, and whether they have a sign.
MOMENTS = {"mu": True, "nu": False, "trace": True}
BASES = ("projector",)  # fields that span a subspace: bfloat16
DECADES = 7


class Quantised(NamedTuple):
    """codes: uint8, of the array's shape. scales: float32 [..., ceil(last axis / BLOCK)]."""

    codes: jax.Array
    scales: jax.Array


def quantise(x: jax.Array, *, signed: bool) -> Quantised:
    """``x`` (float; >= 0 unless ``signed``), each entry to the nearest code."""
    blocks = _blocks(x.astype(jnp.float32))
    most = 128 if signed else 256
    top = 1 - 0.9 / most  # the largest code
    scales = jnp.max(jnp.abs(blocks), axis=-1) / top
    share = jnp.abs(blocks) / jnp.where(scales > 0, scales, 1.0)[..., None]
    share = share.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    decade = jnp.clip(jnp.ceil(jnp.log10(jnp.maximum(share, 1e-30))), 1 - DECADES, 0)
    count = jnp.exp2(decade + (DECADES - 1 if signed else DECADES))
    inside = jnp.floor((share * 10.0**-decade - 0.1) / 0.9 * count)
    number = count + jnp.clip(inside, 0, count - 1)
    # The beginning of a decade is nearer to the last code below it: at the lowest, to 0.
    first = 10.0**decade * (0.1 + 0.45 / count)
    below = jnp.where(decade > 1 - DECADES, 10.0 ** (decade - 1) * (1 - 0.9 / count), 0.0)
    number = number - (share < (first + below) / 2)
    code = (number if signed else number - 1).astype(jnp.uint8)
    if signed:
        code = code | jnp.where(x < 0, jnp.uint8(128), jnp.uint8(0))
    return Quantised(code, scales)


def dequantise(q: Quantised, *, signed: bool) -> jax.Array:
    """The float32 array that the codes stand for."""
    code = q.codes.astype(jnp.int32)
    number = (code & 127) if signed else code + 1
    digits = 31 - jax.lax.clz(jnp.maximum(number, 1))
    count = jnp.exp2(digits.astype(jnp.float32))
    decade = digits - (DECADES - 1 if signed else DECADES)
    fraction = 0.1 + 0.9 * (number.astype(jnp.float32) - count + 0.5) / count
    share = jnp.where((number if signed else code) > 0, fraction * 10.0**decade, 0.0)
    if signed:
        share = jnp.where(code > 127, -share, share)
    blocks = _blocks(share) * q.scales[..., None]
    return blocks.reshape(*share.shape[:-1], -1)[..., : share.shape[-1]]


def _blocks(x: jax.Array) -> jax.Array:
    """[..., n] -> [..., ceil(n / BLOCK), BLOCK], padded with zeros."""
    count = -(-x.shape[-1] // BLOCK)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * BLOCK - x.shape[-1])])
    return padded.reshape(*x.shape[:-1], count, BLOCK)


def in_eight_bits(rule: Rule) -> Rule:
    """The rule with its moments held in 8 bits between updates, and bases of subspaces in 16."""

    def init(param):
        def one(path, x):
            name = _name(path, x)
            if name in MOMENTS:
                return quantise(x, signed=MOMENTS[name])
            return x.astype(jnp.bfloat16) if name in BASES else x

        return jax.tree_util.tree_map_with_path(one, rule.init(param))

    def held(state: Any, before: Any) -> Any:
        def one(path, was, x):
            if not isinstance(was, Quantised):
                return x.astype(was.dtype)
            return quantise(x, signed=MOMENTS[path[-1].name])

        return jax.tree_util.tree_map_with_path(
            one, before, state, is_leaf=lambda x: isinstance(x, Quantised)
        )

    def free(state: Any) -> Any:
        def one(path, x):
            if not isinstance(x, Quantised):
                return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
            return dequantise(x, signed=MOMENTS[path[-1].name])

        return jax.tree_util.tree_map_with_path(
            one, state, is_leaf=lambda x: isinstance(x, Quantised)
        )

    def update(grad, state, param, step, key):
        direction, new = rule.update(grad, free(state), param, step, key)
        return direction, held(new, state)

    return Rule(init, update, rule.elementwise)


def _name(path, x) -> str | None:
    """Of the field that holds an array, where it is large enough."""
    return getattr(path[-1], "name", None) if path and x.size >= LEAST else None
