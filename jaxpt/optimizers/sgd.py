"""Stochastic gradient descent with momentum (Polyak 1964; Nesterov's: Sutskever et al. 2013)."""

from __future__ import annotations

import dataclasses

import optax

from jaxpt.errors import ConfigError
from jaxpt.optimizers.base import Optimizer, Rule, Tensor, check_shares, of_optax


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """m <- momentum m + g;  u = m, or g + momentum m with ``nesterov``. Decay is decoupled."""

    lr: float = 0.1  # learning rate where the schedule is 1
    momentum: float = 0.9  # decay of the sum of gradients; 0 keeps no state
    nesterov: bool = False  # look one step ahead

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "momentum")
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov", "needs a momentum greater than 0")

    def rule(self, tensor: Tensor) -> Rule:
        if not self.momentum:
            return of_optax(optax.identity(), elementwise=True)
        return of_optax(optax.trace(self.momentum, self.nesterov), elementwise=True)
