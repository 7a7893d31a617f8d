"""Decay of the product of low-rank factors instead of the factors.

Khodak et al. 2021, "Initialization and Regularization of Factorized Neural Layers", section 3.2;
Kamalakara et al. 2022, "Exploring Low Rank Training of Deep Neural Networks".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.growth.base import Update
from jaxpt.growth.reset_moments import factors
from jaxpt.state import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class FrobeniusDecay(Update):
    """The step of gradient descent on decay/2 ||A B||_F^2 of every low-rank weight, decoupled from
    the optimizer's as its own weight decay is, and after it:

        A <- A - lr decay A (B B^T)        B <- B - lr decay (A^T A) B

    where lr is the learning rate of A and of B. Plain decay of the factors would pull at
    ||A||^2 + ||B||^2, which says little of the matrix; it goes on beside this, where a group of
    the optimizer does not switch it off: ``Group("*/[ab]", weight_decay=0.0)``.
    """

    decay: float = 0.1  # pull of A B towards 0, as a share of lr

    def __post_init__(self):
        if not self.decay > 0:
            raise ConfigError("decay", f"{self.decay} is not valid; give a number > 0")

    @property
    def needs_gradients(self):
        return False

    def init(self, model, params, key):
        return {}

    def bind(self, model, optimizer):
        places = [tuple(place.paths.values()) for place in factors(model)]
        for path in (path for pair in places for path in pair):
            if path not in optimizer.rules:
                raise ConfigError("", f"{path} is frozen: it does not decay")

        def update(state, grads, key):
            flat = flatten(state.params)
            for pair in places:
                # The learning rate of the update that has just been made.
                rates = [optimizer.rates[path](state.opt_state.count - 1) for path in pair]
                a, b = (flat[path].astype(jnp.float32) for path in pair)
                pulls = gradients(a, b)
                for path, old, rate, pull in zip(pair, (a, b), rates, pulls, strict=True):
                    flat[path] = (old - rate * self.decay * pull).astype(flat[path].dtype)
            return dataclasses.replace(state, params=unflatten(flat))

        return update


def gradients(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of ||A B||_F^2 / 2 for A [..., n, r] and B [..., r, m], by products of [r, r] alone."""
    transpose = jnp.matrix_transpose
    return a @ (b @ transpose(b)), (transpose(a) @ a) @ b
