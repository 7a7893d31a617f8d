"""Sparse plus low rank: SLTrain (Han et al. 2024, "SLTrain: a sparse plus low-rank approach for
parameter and memory efficient pretraining", section 3)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.weights.base import Scope, Weight, WeightModule, replaced
from jaxpt.weights.init import Constant, FanInUniform
from jaxpt.weights.low_rank import check_rank, factors, rank_of
from jaxpt.weights.support import Grouped, Uniform
from kernels.low_rank_sparse import low_rank_sparse, materialise

ROUNDS = 12  # alternating projections of ``from_dense``


@dataclasses.dataclass(frozen=True)
class SparsePlusLowRank(Weight):
    """y = x W with W = (alpha / rank) A B + S: A [d_in, rank], B [rank, d_out], S sparse.

    The support of S is drawn once and stays. At the start B is 0, A uniform on +-1/sqrt(d_in)
    (Kaiming's, as the authors' code has it) and the values of S uniform on +-1/sqrt(d_in).
    The backward pass keeps x, the factors, the values and the support, and forms W anew
    (section 3.2, equations 2 and 3): no W lives between the passes.
    """

    factors: ClassVar[tuple[str, ...]] = ("a", "b")
    cost: ClassVar[str] = "smaller, not faster: every pass forms the dense matrix, and keeps none"

    rank: int = 128  # columns of A and rows of B
    alpha: float = 16.0  # A B is scaled by alpha / rank
    support: Grouped | Uniform = Grouped()  # which entries S holds

    def __post_init__(self):
        check_rank(self.rank)
        if not self.alpha > 0:
            raise ConfigError("alpha", f"{self.alpha} is not valid; give a number > 0")

    def build(self, scope, d_in, d_out, axes, init):
        return SparsePlusLowRankModule(self, scope, d_in, d_out, axes)

    def flops(self, d_in, d_out):
        """Of the product with W for one token; forming W costs 2 d_in d_out rank a batch more."""
        return 2 * d_in * d_out

    def parameters(self, d_in, d_out):
        values = 1
        for n in self.support.shape(d_in, d_out):
            values *= n
        return rank_of(self.rank, d_in, d_out) * (d_in + d_out) + values


class SparsePlusLowRankModule(WeightModule):
    def __init__(self, config: SparsePlusLowRank, scope: Scope, d_in: int, d_out: int, axes):
        rank, support = rank_of(config.rank, d_in, d_out), config.support
        self.scale, self.support = config.alpha / rank, support
        try:
            held = support.shape(d_in, d_out)
        except ConfigError as error:
            raise ConfigError("weights", f"{scope.name}: support.{error}") from None
        kaiming = FanInUniform()
        self.a = scope.param("a", (d_in, rank), (axes[0], "rank"), kaiming, fan_in=d_in)
        self.b = scope.param("b", (rank, d_out), ("rank", axes[1]), Constant(0.0), fan_in=rank)
        places = support.axes(axes)
        self.values = scope.param("values", held, places, kaiming, fan_in=d_in, kind="sparse")
        if support.kept:
            self.indices = scope.constant(
                "indices", held, places, lambda key: support.draw(key, d_in, d_out), support.dtype
            )
        else:
            words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
            self.indices = scope.constant(
                "indices", words.shape, (None,), jax.random.key_data, words.dtype.name
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        return low_rank_sparse(x, *self._arrays(), scale=self.scale, group=self.support.group)

    def dense(self) -> jax.Array:
        return materialise(*self._arrays(), scale=self.scale, group=self.support.group)

    def from_dense(self, matrix: jax.Array) -> SparsePlusLowRankModule:
        """Nearly the nearest, on this support: S and A B take the rest of one another in turn
        (alternating projections; Zhou and Tao 2011, "GoDec", algorithm 1)."""
        matrix, shape = matrix.astype(jnp.float32), matrix.shape
        rank, indices = self.a.shape[1], self._arrays()[-1]
        sparse = jnp.zeros(self.values.shape, jnp.float32)

        def round_(_, carry):
            sparse = carry[0]
            rest = matrix - self.support.spread(sparse, indices, *shape)
            a, b = factors(rest, rank)
            return self.support.gather(matrix - a @ b, indices), a, b

        start = (sparse, *factors(matrix, rank))
        sparse, a, b = jax.lax.fori_loop(0, ROUNDS, round_, start)
        return replaced(self, a=a / self.scale, b=b, values=sparse)

    def _arrays(self) -> tuple[jax.Array, ...]:
        a, b, indices = self.a[...], self.b[...], self.indices[...]
        if not self.support.kept:
            key = jax.random.wrap_key_data(indices)
            indices = self.support.draw(key, a.shape[0], b.shape[1])
        return a, b, self.values[...], indices
