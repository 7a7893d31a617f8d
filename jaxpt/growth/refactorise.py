"""Low-rank factors made even again (Glentis et al. 2025, "Scalable Parameter and Memory Efficient
Pretraining for LLM: Recent Algorithmic Advances and Benchmarking": weight refactorisation)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxpt.growth import periodic
from jaxpt.growth.base import Update
from jaxpt.growth.reset_moments import factors
from kernels import linalg

LEAST = 1e-6  # of the largest singular value, whose root a column of A is at least as long as


@dataclasses.dataclass(frozen=True)
class Refactorise(Update):
    """Every ``every`` updates of the phase, for A B = U diag(s) V of every low-rank weight,

        A <- U sqrt(s)        B <- sqrt(s) V

    of ``LowRank``, ``SparsePlusLowRank`` and ``LoRA`` alike. The product stays as it is; the
    factors, which training makes uneven, are evenly scaled and have orthogonal columns again.
    The optimizer's states are those of the old factors: see ``ResetMoments``.
    """

    every: int = 200  # updates between two refactorisations

    def __post_init__(self):
        periodic.check_every(self.every)

    @property
    def needs_gradients(self):
        return False

    def validate(self, phase):
        periodic.check_no_average(phase)

    def init(self, model, params, key):
        return {}

    def bind(self, model, optimizer):
        def change(place, params, states, key):
            names = place.names
            return dict(zip(names, even(*(params[n] for n in names)), strict=True)), states

        return periodic.periodically(optimizer, self.every, factors(model), change)


def even(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors [n, r] and [r, m] of the same product, by two QR decompositions and a singular value
    decomposition of [r, r], in float32.

    Where a singular value is nearly 0, the column of A is not let go to 0 with it: with both
    factors 0 there the gradients would be 0 ever after. Factors of the product 0 stay.
    """
    qa, ra = linalg.qr(a.astype(jnp.float32))
    qb, rb = linalg.qr(b.astype(jnp.float32).T)
    with jax.default_matmul_precision("float32"):
        u, s, vt = linalg.svd(ra @ rb.T)
        root = jnp.sqrt(jnp.maximum(s, LEAST * s[0]))
        share = s / jnp.where(root > 0, root, 1.0)
        left, right = qa @ (u * root), (share[:, None] * vt) @ qb.T
    alive = s[0] > 0
    return jnp.where(alive, left, a).astype(a.dtype), jnp.where(alive, right, b).astype(b.dtype)
