"""How a density is spread over the matrices of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.errors import ConfigError
from jaxpt.growth.periodic import Place
from jaxpt.sparsity.base import Seen, Supports, weight_of
from jaxpt.weights.patterns import Groups
from jaxpt.weights.selection import top_of_all

# uniform  every matrix has the density (every competition of its pattern, exactly)
# erk      Erdos-Renyi: a matrix's density is in proportion to (d_in + d_out) / (d_in d_out), at
#          most 1 (Evci et al. 2020, "RigL", section 3, "Sparsity distribution")
# global   units of all matrices compete with one another
Spread = Literal["uniform", "erk", "global"]
SPREADS: tuple[Spread, ...] = ("uniform", "erk", "global")


def check(spread: Spread) -> None:
    if spread not in SPREADS:
        raise ConfigError("spread", f"{spread!r} is not one of {', '.join(SPREADS)}")


def check_weights(spread: Spread, weights: Mapping[str, Place]) -> None:
    """Raises ConfigError where the weights do not admit of the spread."""
    for path, place in weights.items():
        weight = weight_of(place)
        if weight.fixed:
            raise ConfigError(
                "", f"{path} holds a fixed number of units: another density needs Masked"
            )
        if spread != "uniform" and isinstance(weight.pattern, Groups):
            raise ConfigError(
                "spread", f"{spread!r} is not valid: {path} holds as many of every group"
            )


def erk(shapes: Sequence[tuple[int, int]], density: float) -> list[float]:
    """The density of each matrix [d_in, d_out], such that all together have ``density``.

    Matrices whose share would be above 1 are dense, and the others take what they leave.
    """
    sizes = np.array([n * m for n, m in shapes], np.float64)
    raw = np.array([(n + m) / (n * m) for n, m in shapes])
    dense = np.zeros(len(sizes), bool)
    while True:
        left = density * sizes.sum() - sizes[dense].sum()
        scale = left / (raw * sizes)[~dense].sum() if not dense.all() else 0.0
        over = ~dense & (scale * raw > 1)
        if not over.any():
            return np.where(dense, 1.0, scale * raw).tolist()
        dense |= over


def keep(
    scores: Mapping[str, jax.Array],
    seen: Mapping[str, Seen],
    densities: Sequence[float],
    at: jax.Array | int,
    spread: Spread,
) -> Supports:
    """The supports of the largest scores.

    Args:
      scores: [L, *grid] of each weight.
      densities: a few; how many units each of them means is known beforehand, exactly.
      at: which of them holds now.
    """
    if spread == "global":
        units = sum(x.size for x in scores.values())
        counts = [max(1, int(np.floor(d * units + 0.5))) for d in densities]
        return top_of_all(scores, jnp.asarray(np.array(counts, np.uint32))[at])
    each = {path: [(seen[path].shape)] * len(x) for path, x in scores.items()}
    shapes = [shape for more in each.values() for shape in more]
    names = [path for path, more in each.items() for _ in more]
    tables: dict[str, list[int]] = {path: [] for path in scores}
    for density in densities:
        shares = erk(shapes, density) if spread == "erk" else [density] * len(shapes)
        share_of = dict(zip(names, shares, strict=True))  # layers of a stack have one shape
        for path in scores:
            tables[path].append(seen[path].pattern.count(share_of[path], *seen[path].shape))
    return {
        path: seen[path].pattern.top(x, jnp.asarray(np.array(tables[path], np.int32))[at])
        for path, x in scores.items()
    }
