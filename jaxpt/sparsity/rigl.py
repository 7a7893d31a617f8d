"""RigL (Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", algorithm 1)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxpt.sparsity.evolution import check_share
from jaxpt.sparsity.exchange import exchanged
from jaxpt.sparsity.schedules import Periodic, cosine


@dataclasses.dataclass(frozen=True)
class RigL(Periodic):
    """At each update a share of the units held in a matrix, those of the smallest magnitude, gives
    way to as many others, those of the largest gradient of the step's batch (the mean magnitude
    over a unit). The share falls by a cosine from ``drop`` at the start to 0 at the stop.

    Each matrix (each group of N:M) holds as many units as before. Units that were just dropped may
    be taken again, and then begin at 0 as all new ones do. (In the paper such a step makes no
    step of the optimizer; here it goes on with the new masks, and the gradient of all entries is a
    pass of its own, which at ``every`` = 100 is 1% more.) Dense in disguise with ``Masked``: see
    there.
    """

    drop: float = 0.3  # share of the held units that are exchanged at first

    def __post_init__(self):
        check_share("drop", self.drop)

    def renew(self, step, seen, slopes):
        share = cosine(self.drop, self.updates)[self.number(step)]
        gradients = slopes({path: each.matrix for path, each in seen.items()})
        return {
            path: exchanged(each, each.support, share, each.pattern.mean(jnp.abs(gradients[path])))
            for path, each in seen.items()
        }
