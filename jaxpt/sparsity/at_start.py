"""Masks chosen before the first step: at random, by magnitude, or by what a batch says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.sparsity import spread as spreads
from jaxpt.sparsity.base import Matrices, Seen, Slopes, Sparsify, weight_of
from jaxpt.sparsity.spread import Spread


@dataclasses.dataclass(frozen=True)
class Score:
    """What units are chosen by at the start; subclasses stand in a file each."""

    rounds = 1  # in which the density falls, by equal factors; scores are made anew in each

    def __call__(
        self, seen: Mapping[str, Seen], matrices: Matrices, slopes: Slopes
    ) -> dict[str, jax.Array]:
        """A score for each unit, [L, *grid], of which the largest stay: a pure function.

        Args:
          seen: of each weight, by path.
          matrices: [L, d_in, d_out] of each, 0 where earlier rounds have left units out.
          slopes: see ``Sparsify.renew``.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Random(Score):
    """At random."""

    def __call__(self, seen, matrices, slopes):
        return {path: each.bits for path, each in seen.items()}


@dataclasses.dataclass(frozen=True)
class Magnitude(Score):
    """The mean magnitude of a unit."""

    def __call__(self, seen, matrices, slopes):
        return {
            p: seen[p].pattern.mean(jnp.abs(m.astype(jnp.float32))) for p, m in matrices.items()
        }


@dataclasses.dataclass(frozen=True)
class AtStart(Sparsify):
    """Before the phase's first step, given its batch, weights that are dense (``Masked(1.0)``) keep
    the share ``density`` of their units: those of the largest ``score``. Masks stay as they are
    then, unless an update that comes after this one changes them (``RigL``, say, which goes on with
    what each matrix holds).

    The scores of a batch take passes of their own at that step; the program has them as a branch.
    Dense in disguise: see ``Masked``.
    """

    score: Score = Random()  # by what: Random(), Magnitude(), SNIP(), GraSP() or SynFlow()
    density: float = 0.25  # share of the units that is held
    spread: Spread = "uniform"  # how the density is spread over matrices: uniform, erk or global

    def __post_init__(self):
        if not 0 < self.density < 1:
            raise ConfigError("density", f"{self.density} does not lie in (0, 1)")
        spreads.check(self.spread)

    def check(self, weights):
        spreads.check_weights(self.spread, weights)
        for path, place in weights.items():
            if weight_of(place).density != 1:
                raise ConfigError(
                    "", f"{path} has left units out before they can be scored: give Masked(1.0)"
                )

    def due(self, step):
        return step == 0

    def renew(self, step, seen, slopes):
        matrices = {path: each.matrix for path, each in seen.items()}
        rounds = self.score.rounds
        densities = [self.density ** ((i + 1) / rounds) for i in range(rounds)]
        supports = {path: each.support for path, each in seen.items()}

        def round_(i, supports):
            held = {
                path: jnp.where(each.pattern.spread(supports[path], *each.shape), matrices[path], 0)
                for path, each in seen.items()
            }
            scores = self.score(seen, held, slopes)
            return spreads.keep(left(scores, supports), seen, densities, i, self.spread)

        if rounds == 1:
            return round_(0, supports)
        return jax.lax.fori_loop(0, rounds, round_, supports)


def left(scores: dict[str, jax.Array], supports: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scores with the lowest of all where a unit has been left out."""
    return {
        path: jnp.where(supports[path], x, 0 if x.dtype == jnp.uint32 else -jnp.inf)
        for path, x in scores.items()
    }
