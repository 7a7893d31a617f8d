"""GraNet (Liu et al. 2021, "Sparse Training via Boosting Pruning Plasticity with
Neuroregeneration", algorithm 1)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxpt.duration import Duration, share
from jaxpt.sparsity.evolution import check_share
from jaxpt.sparsity.exchange import exchanged
from jaxpt.sparsity.gradual import Gradual
from jaxpt.sparsity.schedules import cosine


@dataclasses.dataclass(frozen=True)
class GraNet(Gradual):
    """At each update units are pruned by magnitude to the cubic schedule's target, as in
    ``Gradual``; of those that are left a further share (a cosine from ``drop`` to 0) is dropped by
    magnitude, and as many are grown by gradient, as in ``RigL``.

    Dense to sparse where the weights begin with density 1, sparse to sparse below. Dense in
    disguise: see ``Masked``.
    """

    start: int | float | Duration = 0  # where in the phase pruning begins
    stop: int | float | Duration = share(0.75)  # where in the phase it ends
    drop: float = 0.5  # share of what is left that is exchanged, at first

    def __post_init__(self):
        super().__post_init__()
        check_share("drop", self.drop)

    def renew(self, step, seen, slopes):
        share = cosine(self.drop, self.updates)[self.number(step)]
        gradients = slopes({path: each.matrix for path, each in seen.items()})
        left = self.pruned(step, seen)
        return {
            path: exchanged(each, left[path], share, each.pattern.mean(jnp.abs(gradients[path])))
            for path, each in seen.items()
        }
