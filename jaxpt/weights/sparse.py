"""Weights of which some units are held: what ``jaxpt.sparsity`` chooses, and changes in training.

To let its algorithms choose what a weight holds, derive its config from ``Sparse`` and its module
from ``SparseModule``. Algorithms see supports (bool [*grid], which units are held), the matrix that
the weight stands for and, at the steps at which they ask, the gradient of all its entries: that is
made by a model of the same numbers whose sparse weights are ``Dense``, so that a weight need not be
able to give it. They answer with new supports.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from jaxpt.errors import ConfigError
from jaxpt.weights.base import Scope, Weight, WeightModule
from jaxpt.weights.patterns import Blocks, Entries, Groups

AnyPattern = Entries | Groups | Blocks


@dataclasses.dataclass(frozen=True)
class Sparse(Weight):
    """Config of a weight that holds the share ``density`` of the units of a pattern.

    fixed: whether its shapes give how many units it holds, so that an algorithm may exchange
      units, as many in each matrix as before, and no more.
    keeps: whether entries that are not held are kept, and trained or scored on.
    held: names of the parameters that have a place for every unit that is held. They, and moments
      of their shapes, are carried along when the support changes.
    """

    fixed: ClassVar[bool] = False
    held: ClassVar[tuple[str, ...]] = ("w",)

    density: float = 1.0  # share of the units that are held at first, drawn at random
    pattern: AnyPattern = Entries()  # what is held or not together

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise ConfigError("density", f"{self.density} does not lie in (0, 1]")
        if isinstance(self.pattern, Groups):
            kept = self.density * self.pattern.size
            if abs(kept - round(kept)) > 1e-6 or round(kept) < 1:
                size = self.pattern.size
                raise ConfigError(
                    "density", f"{self.density} of groups of {size} is {kept:g}, no whole number"
                )

    @property
    def keeps(self) -> bool:
        return False

    def count(self, d_in: int, d_out: int) -> int:
        """Units that each competition of the pattern holds at first."""
        return self.pattern.count(self.density, d_in, d_out)

    def check(self, scope: Scope, d_in: int, d_out: int) -> None:
        """Raises ConfigError, with the matrix's name, where it does not fit the pattern."""
        try:
            self.pattern.grid(d_in, d_out)
        except ConfigError as error:
            raise ConfigError("weights", f"{scope.name}: pattern.{error}") from None


class SparseModule(WeightModule):
    """The module of a ``Sparse`` weight."""

    def support(self) -> jax.Array:
        """bool [*grid]: which units are held."""
        raise NotImplementedError

    def places(self, support: jax.Array) -> dict[str, jax.Array]:
        """The parameters that say where units lie (masks, indices), by name, for a support.

        With ``fixed`` the support holds as many units as the weight's own.
        """
        raise NotImplementedError

    def carry(self, array: jax.Array, support: jax.Array) -> jax.Array:
        """An array of the shape of a parameter in ``Sparse.held`` (the parameter, or a moment of
        it) as it is with a new support: what belongs to units that stay goes with them, and what
        belongs to new ones is 0."""
        raise NotImplementedError

    def numbers(self) -> jax.Array:
        """The matrix [d_in, d_out] whose entries compete: ``dense()``, unless numbers that are not
        held are kept too."""
        return self.dense()

    def entries(self) -> jax.Array:
        """How many entries of the matrix are held, a scalar."""
        raise NotImplementedError
