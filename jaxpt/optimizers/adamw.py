"""AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019, algorithm 2)."""

from __future__ import annotations

import dataclasses

import optax

from jaxpt.errors import ConfigError
from jaxpt.optimizers.base import Optimizer, Rule, StateType, Tensor, check_shares, of_optax


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    """

    weight_decay: float = 0.1  # pull of matrices towards 0, as a share of lr
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    mu_dtype: StateType | None = None  # type of the first moment; None: the state's

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "b1", "b2")
        if not self.eps > 0:
            raise ConfigError("eps", f"{self.eps} is not valid; give a number > 0")

    def rule(self, tensor: Tensor) -> Rule:
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype)
        return of_optax(adam, elementwise=True)
