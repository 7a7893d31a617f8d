"""SET (Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science", algorithm 1)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.sparsity.exchange import exchanged
from jaxpt.sparsity.schedules import Periodic


@dataclasses.dataclass(frozen=True)
class SET(Periodic):
    """At each update the share ``drop`` of the units held in a matrix, those of the smallest
    magnitude, gives way to as many others at random.

    Each matrix (each group of N:M) holds as many units as before. Dense in disguise with
    ``Masked``; what a weight that holds only its units saves is kept. An update needs no gradient.
    """

    drop: float = 0.3  # share of the held units that are exchanged

    def __post_init__(self):
        check_share("drop", self.drop)

    def renew(self, step, seen, slopes):
        return {p: exchanged(s, s.support, jnp.float32(self.drop), s.bits) for p, s in seen.items()}


def check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(name, f"{value} does not lie in (0, 1)")
