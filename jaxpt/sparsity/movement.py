"""Movement pruning, of blocks mostly (Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by
Fine-Tuning"; Lagunas et al. 2021, "Block Pruning For Faster Transformers", section 3)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxpt.sparsity.gradual import Gradual
from jaxpt.sparsity.straight_through import check_trains


@dataclasses.dataclass(frozen=True)
class Movement(Gradual):
    """Units stay by their scores S, which are trained: S changes by -sum(dL/d(W * M) * W) over the
    unit, and so rises where entries move away from 0. The density follows ``Gradual``'s schedule;
    what was left out may come back, with the numbers that it had.

    For weights ``Masked(trains="scores", pattern=Blocks(32, 32))``, whose scores are trained by the
    optimizer as all else is; the papers give them a learning rate of their own, which is a
    ``Group("*/scores", lr_scale=...)``. Dense in disguise; what remains are whole blocks, for a
    ``BlockSparse`` weight to go on with.
    """

    def check(self, weights):
        super().check(weights)
        check_trains(weights, "scores")

    def importance(self, seen):
        return seen.params["scores"].astype(jnp.float32)

    def pruned(self, step, seen):
        every = {
            p: dataclasses.replace(s, support=jnp.ones_like(s.support)) for p, s in seen.items()
        }
        return super().pruned(step, every)
