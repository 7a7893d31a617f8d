"""Stochastic rounding of bfloat16 parameters (Gupta et al. 2015, "Deep learning with limited
numerical precision", section 3.1)."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp

from jaxpt.optimizers.rules import Rule

_OWN = zlib.crc32(b"rounding")  # apart from what a rule draws with its key


def stochastic(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> float32, each entry at one of the two bfloat16 numbers next to it: the nearer
    the likelier, so that the mean is the entry. Those that are bfloat16 numbers stay, and so do
    infinities and NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(up & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x)


def rounded(rule: Rule) -> Rule:
    """The rule with changes that lead from a bfloat16 parameter to another bfloat16 number.

    Its directions are changes: p + change, in float32, is the stochastically rounded sum, so that
    whoever adds them has nothing left to round. Parameters of other types are as they were.
    (Where changes take the place of bfloat16 gradients, in ``by_tensor`` in turn, a sum that is far
    from its parameter may be the number next to that: its mean is the same.)
    """

    def update(grad, state, param, step, key):
        change, state = rule.update(grad, state, param, step, key)
        key = jax.random.fold_in(jax.random.fold_in(key, _OWN), step)
        changes, tree = jax.tree.flatten(change)
        for i, old in enumerate(jax.tree.leaves(param)):
            if old.dtype == jnp.bfloat16:
                start = old.astype(jnp.float32)
                end = start + changes[i].astype(jnp.float32)
                changes[i] = stochastic(end, jax.random.fold_in(key, i)) - start
        return tree.unflatten(changes), state

    return rule._replace(update=update)
