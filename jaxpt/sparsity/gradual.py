"""Gradual magnitude pruning (Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy
of pruning for model compression"; Jin et al. 2025, "The Journey Matters: Average Parameter Count
over Pre-training Unifies Sparse and Dense Scaling Laws", which prunes from a quarter of training to
three quarters)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxpt.duration import Duration, share
from jaxpt.errors import ConfigError
from jaxpt.growth.periodic import Place
from jaxpt.sparsity import spread as spreads
from jaxpt.sparsity.base import Seen, Supports, weight_of
from jaxpt.sparsity.schedules import Periodic, cubic
from jaxpt.sparsity.spread import Spread


@dataclasses.dataclass(frozen=True)
class Gradual(Periodic):
    """The density falls from that which the weights begin with to ``density`` by a cubic schedule:
    at update i of n the units of the largest magnitude stay, of those that are held,

        density + (first - density) (1 - i / n)^3

    of all. With groups (N:M) each keeps the nearest whole number. What is left out stays out. Dense
    in disguise: see ``Masked``; the metric "average_active_parameters" is what the scaling law of
    Jin et al. goes by.
    """

    density: float = 0.25  # share of the units that is held at the end
    start: int | float | Duration = share(0.25)  # where in the phase pruning begins
    stop: int | float | Duration = share(0.75)  # where in the phase it has come to ``density``
    # how the density is spread over matrices: uniform, erk or global (spread.py)
    spread: Spread = "uniform"

    def __post_init__(self):
        if not 0 < self.density < 1:
            raise ConfigError("density", f"{self.density} does not lie in (0, 1)")
        spreads.check(self.spread)

    def check(self, weights):
        spreads.check_weights(self.spread, weights)
        first = first_density(weights)
        if first <= self.density:
            raise ConfigError("density", f"{self.density} is not below the weights' own, {first}")
        if self.updates < 1:
            raise ConfigError("every", f"{self.every} steps are more than those from start to stop")

    def importance(self, seen: Seen) -> jax.Array:
        """[L, *grid] >= 0, of which the largest stay."""
        return seen.magnitude

    def renew(self, step, seen, slopes):
        return self.pruned(step, seen)

    def pruned(self, step: jax.Array, seen: Mapping[str, Seen]) -> Supports:
        first = next(iter(seen.values())).weight.density
        densities = cubic(first, self.density, self.updates)
        scores = {p: jnp.where(s.support, self.importance(s), -jnp.inf) for p, s in seen.items()}
        return spreads.keep(scores, seen, densities, self.number(step), self.spread)


def first_density(weights: Mapping[str, Place]) -> float:
    """The density that all weights begin with. Raises ConfigError where they differ."""
    found = {path: weight_of(place).density for path, place in weights.items()}
    if len(set(found.values())) > 1:
        each = ", ".join(f"{path} {density}" for path, density in found.items())
        raise ConfigError("", f"all sparse weights must begin with one density: {each}")
    return next(iter(found.values()))
