"""Stable-SPAM (Huang et al. 2025, "Stable-SPAM: how to train in 4-bit more stably than 16-bit
Adam", algorithm 1)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpt.errors import ConfigError
from jaxpt.optimizers.base import Optimizer, Rule, Tensor, check_shares, of_optax


class Steadied(NamedTuple):
    """adam: the moments. averages: float32 [3], of max |g|, |g| and |g|^2."""

    adam: optax.ScaleByAdamState
    averages: jax.Array


@dataclasses.dataclass(frozen=True)
class StableSPAM(Optimizer):
    """Adam on gradients that are cut and normalised by their own history, tensor by tensor, with
    moments that begin anew every ``period`` steps. <x> is the average of x with decay gamma so
    far, a <- gamma a + (1 - gamma) x, divided by 1 - gamma^t:

        T = <max |g|>_gamma3,   g <- g T / max |g|   where |g| > T       AdaClip
        g <- g / |g| <|g|>_gamma1 / (sqrt(<|g|^2>_gamma2) + eps)         AdaGN
        m, v <- 0, 0                                 every period steps
        u <- Adam(g)

    Where the authors' code departs from this (it starts counting t anew for the averages too, which
    are not reset: for hundreds of steps then nothing is cut) we do not follow it.
    """

    clip: float | None = None  # greatest global norm of the gradient; None for no clipping
    gamma1: float = 0.7  # decay of the average norm
    gamma2: float = 0.9  # decay of the average squared norm
    gamma3: float = 0.999  # decay of the average of the largest entry
    period: int | None = 1000  # steps from one reset of the moments to the next; None: never
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # added to the roots of second moments

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "b1", "b2", "gamma1", "gamma2", "gamma3")
        if not self.eps > 0:
            raise ConfigError("eps", f"{self.eps} is not valid; give a number > 0")
        if self.period is not None and self.period < 1:
            raise ConfigError("period", f"{self.period} is not valid; give 1 or more, or None")

    def rule(self, tensor: Tensor) -> Rule:
        adam = of_optax(optax.scale_by_adam(self.b1, self.b2, self.eps))

        def init(param):
            return Steadied(adam.init(param), jnp.zeros(3, jnp.float32))

        def update(g, state, param, step, key):
            since = step if self.period is None else step % self.period
            moments = jax.tree.map(lambda x: jnp.where(since == 0, 0, x), state.adam)
            steady, averages = self._steadied(g.astype(jnp.float32), state.averages, step)
            u, moments = adam.update(steady.astype(g.dtype), moments, param, since, key)
            return u, Steadied(moments, averages)

        return Rule(init, update)

    def _steadied(self, g, averages, step):
        """(g after AdaClip and AdaGN, the new averages)."""
        largest, norm, square = averages

        def seen(average, x, decay):
            average = decay * average + (1 - decay) * x
            return average, average / (1 - decay ** (step + 1))

        most = jnp.max(jnp.abs(g))
        largest, bound = seen(largest, most, self.gamma3)
        g = jnp.where(jnp.abs(g) > bound, g * (bound / jnp.where(most > 0, most, 1)), g)
        now = jnp.linalg.norm(g)
        norm, expected = seen(norm, now, self.gamma1)
        square, spread = seen(square, now**2, self.gamma2)
        wanted = expected / (jnp.sqrt(spread) + self.eps)
        g = g * (wanted / jnp.where(now > 0, now, 1))
        return g, jnp.stack([largest, norm, square])
