"""Lion (Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

import dataclasses

import optax

from jaxpt.optimizers.base import Optimizer, Rule, StateType, Tensor, check_shares, of_optax


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """u = sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g

    Its authors advise a learning rate 3 to 10 times smaller than AdamW's and a weight decay as
    many times greater (section 5); the defaults are AdamW's with a factor of 10.
    """

    lr: float = 1e-4  # learning rate where the schedule is 1
    weight_decay: float = 1.0  # pull of matrices towards 0, as a share of lr
    b1: float = 0.9  # share of the moment in the update
    b2: float = 0.99  # decay of the moment
    mu_dtype: StateType | None = None  # type of the moment; None: the state's

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "b1", "b2")

    def rule(self, tensor: Tensor) -> Rule:
        lion = optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.mu_dtype)
        return of_optax(lion, elementwise=True)
