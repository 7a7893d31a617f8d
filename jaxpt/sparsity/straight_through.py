"""Straight-through magnitude training: all entries are trained, the largest are used (Jayakumar et
al. 2020, "Top-KAST"; Lee et al. 2023, "JaxPruner", section 3, calls it magnitude with a
straight-through estimator)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.sparsity import spread as spreads
from jaxpt.sparsity.base import Sparsify, weight_of
from jaxpt.sparsity.spread import Spread


@dataclasses.dataclass(frozen=True)
class StraightThrough(Sparsify):
    """Before every ``every``-th step the units of the largest magnitude are held, whether they were
    or not: for weights ``Masked(trains="all")``, whose entries all have the gradient of the masked
    matrix. No number and no moment is lost when it is left out.

    Dense in disguise, optimizer states and all.
    """

    density: float = 0.25  # share of the units that is held
    every: int = 1  # steps between two choices
    spread: Spread = "uniform"  # how the density is spread over matrices: uniform, erk or global

    def __post_init__(self):
        if not 0 < self.density < 1:
            raise ConfigError("density", f"{self.density} does not lie in (0, 1)")
        if self.every < 1:
            raise ConfigError("every", f"{self.every} is not valid; give 1 or more")
        spreads.check(self.spread)

    def check(self, weights):
        spreads.check_weights(self.spread, weights)
        check_trains(weights, "all")

    def due(self, step):
        return step % self.every == 0

    def renew(self, step, seen, slopes):
        scores = {path: each.magnitude for path, each in seen.items()}
        return spreads.keep(scores, seen, [self.density], jnp.int32(0), self.spread)


def check_trains(weights, wanted: str) -> None:
    """Raises ConfigError unless all weights are ``Masked`` and train what is wanted."""
    for path, place in weights.items():
        trains = getattr(weight_of(place), "trains", None)
        if trains != wanted:
            raise ConfigError(
                "", f"{path} is none of this method's: give Masked(trains={wanted!r})"
            )
