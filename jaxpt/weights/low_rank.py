"""A product of two thin matrices (Kamalakara et al. 2022; Khodak et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.weights.base import Scope, Weight, WeightModule, replaced
from jaxpt.weights.init import Init
from jaxpt.weights.product import product
from kernels import linalg

LowRankInit = Literal["spectral", "spectral_ones", "plain"]
INITS: tuple[LowRankInit, ...] = ("spectral", "spectral_ones", "plain")


@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """y = (x A) B, with A [d_in, rank] and B [rank, d_out]; W = A B is never formed.

    Initialisation, for M [d_in, d_out] drawn as a dense matrix would be and its singular value
    decomposition M = U diag(s) V:

        spectral        A = U sqrt(s), B = sqrt(s) V, of the ``rank`` largest (Khodak et al. 2021,
                        section 3.1): A B is the nearest matrix of that rank to M
        spectral_ones   A = U, B = V: every singular value 1 (Kamalakara et al. 2022, section 3.2)
        plain           A and B drawn apart, such that the entries of A B have M's variance

    ``rank`` above min(d_in, d_out) is cut to that, and one below 1 is a target ratio, of the
    factors' numbers to the matrix's (rounded down).
    """

    factors: ClassVar[tuple[str, ...]] = ("a", "b")

    # columns of A and rows of B; below 1 the share of the matrix's numbers that A and B have
    rank: int | float = 64
    init: LowRankInit = "spectral"  # how the factors are drawn

    def __post_init__(self):
        check_rank(self.rank)
        if self.init not in INITS:
            raise ConfigError("init", f"{self.init!r} is not one of {', '.join(INITS)}")

    def build(self, scope, d_in, d_out, axes, init):
        return LowRankModule(self, scope, d_in, d_out, axes, init)

    def flops(self, d_in, d_out):
        return 2 * rank_of(self.rank, d_in, d_out) * (d_in + d_out)

    def parameters(self, d_in, d_out):
        return rank_of(self.rank, d_in, d_out) * (d_in + d_out)


class LowRankModule(WeightModule):
    def __init__(self, config: LowRank, scope: Scope, d_in: int, d_out: int, axes, init: Init):
        rank = rank_of(config.rank, d_in, d_out)
        if config.init == "plain":
            scale_a = scale_b = Scaled(init, rank, d_in, d_out)
        else:
            ones = config.init == "spectral_ones"
            scale_a = SpectralFactor(init, d_in, d_out, "left", ones)
            scale_b = SpectralFactor(init, d_in, d_out, "right", ones)
        # The factors of one decomposition are drawn with one key, which is that of `w`.
        self.a = scope.param(
            "a", (d_in, rank), (axes[0], "rank"), scale_a, fan_in=d_in, fan_out=rank, key_of="w"
        )
        key_of = "b" if config.init == "plain" else "w"
        self.b = scope.param(
            "b",
            (rank, d_out),
            ("rank", axes[1]),
            scale_b,
            fan_in=rank,
            fan_out=d_out,
            key_of=key_of,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return product(product(x, self.a[...]), self.b[...])

    def dense(self) -> jax.Array:
        return self.a[...] @ self.b[...]

    def from_dense(self, matrix: jax.Array) -> LowRankModule:
        """The nearest matrix of its rank, by a truncated singular value decomposition."""
        a, b = factors(matrix, self.a.shape[1])
        return replaced(self, a=a, b=b)


def check_rank(rank: int | float) -> None:
    if not (rank > 0 and (rank < 1 or rank == int(rank))):
        raise ConfigError("rank", f"{rank} is not valid; give a whole number, or a share below 1")


def rank_of(rank: int | float, d_in: int, d_out: int) -> int:
    """The rank that a matrix of this shape gets: at least 1, at most full."""
    if rank < 1:
        rank = max(1, math.floor(rank * d_in * d_out / (d_in + d_out)))
    return min(int(rank), d_in, d_out)


def factors(matrix: jax.Array, rank: int, *, ones: bool = False) -> tuple[jax.Array, jax.Array]:
    """(A [d_in, rank], B [rank, d_out]) in float32: the best approximation, evenly shared.

    With ``ones`` the singular values are replaced by 1.
    """
    u, s, vt = linalg.svd(matrix.astype(jnp.float32))
    root = jnp.ones_like(s[:rank]) if ones else jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


@dataclasses.dataclass(frozen=True)
class Scaled(Init):
    """One factor of a product whose entries have the variance that ``init`` gives the matrix."""

    init: Init
    rank: int
    d_in: int
    d_out: int

    def std(self, fan_in, fan_out):
        return math.sqrt(self.init.std(self.d_in, self.d_out) / math.sqrt(self.rank))

    def __call__(self, key, shape, fan_in, fan_out, dtype):
        drawn = jax.random.normal(key, shape, jnp.float32)
        return (self.std(fan_in, fan_out) * drawn).astype(dtype)


@dataclasses.dataclass(frozen=True)
class SpectralFactor(Init):
    """One factor of the matrix that ``init`` draws."""

    init: Init
    d_in: int
    d_out: int
    side: Literal["left", "right"]
    ones: bool

    def std(self, fan_in, fan_out):
        """Of the matrix itself: that of a factor depends on its rank."""
        return self.init.std(self.d_in, self.d_out)

    def __call__(self, key, shape, fan_in, fan_out, dtype):
        matrix = self.init(key, (self.d_in, self.d_out), self.d_in, self.d_out, jnp.float32)
        pair = factors(matrix, min(shape), ones=self.ones)
        return pair[self.side == "right"].astype(dtype)
