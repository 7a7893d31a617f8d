"""GraSP (Wang et al. 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow",
algorithm 1)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxpt.sparsity.at_start import Score


@dataclasses.dataclass(frozen=True)
class GraSP(Score):
    """w (H g), with g the gradient of the batch's loss and H its Hessian: by how much the squared
    norm of the gradient would fall, to first order, without the entry (half of it); as a mean over
    a unit. Units whose absence would raise it the most are left out. (The paper's selection is
    global, and its Hessian that of the loss at a temperature of 200.)

    Takes about three times the memory and the time of a gradient.
    """

    def __call__(self, seen, matrices, slopes):
        matrices = {path: w.astype(jnp.float32) for path, w in matrices.items()}
        gradient = slopes(matrices)
        curved = jax.jvp(slopes, (matrices,), (gradient,))[1]
        return {path: seen[path].pattern.mean(w * curved[path]) for path, w in matrices.items()}
