"""SNIP (Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
equation 6)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxpt.sparsity.at_start import Score


@dataclasses.dataclass(frozen=True)
class SNIP(Score):
    """|w dL/dw|, how much the loss of the batch feels the entry, as a mean over a unit. (The
    paper's selection is global.)"""

    def __call__(self, seen, matrices, slopes):
        slope = slopes(matrices)
        return {
            path: seen[path].pattern.mean(jnp.abs(w.astype(jnp.float32) * slope[path]))
            for path, w in matrices.items()
        }
