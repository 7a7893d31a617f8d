"""What optimizers share that work in a subspace of each gradient: which side, which subspace.

A gradient is turned so that the side to be projected comes first, [n, m]. With P [n, r], the
rule works on R = P^T G [r, m].
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpt.errors import ConfigError
from jaxpt.optimizers.base import Optimizer, Rule, Tensor, check_shares, of_optax
from jaxpt.optimizers.groups import is_inner_matrix
from kernels import linalg

Side = Literal["smaller", "larger", "in", "out"]
SIDES: tuple[Side, ...] = ("smaller", "larger", "in", "out")


class Moments(NamedTuple):
    """Adam's, of one array."""

    mu: jax.Array
    nu: jax.Array


@dataclasses.dataclass(frozen=True)
class Projected(Optimizer):
    """Adam in a subspace of rank ``rank`` of every matrix inside the network.

    Where the projected side is no longer than ``rank``, and for all other parameters, it is
    plain Adam.
    """

    rank: int = 128  # dimensions of the subspace
    period: int = 200  # steps between one subspace and the next
    side: Side = "smaller"  # side of the matrix that is projected
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "b1", "b2")
        for field in ("rank", "period"):
            if getattr(self, field) < 1:
                raise ConfigError(field, f"{getattr(self, field)} is not valid; give 1 or more")
        if self.side not in SIDES:
            raise ConfigError("side", f"{self.side!r} is not one of {', '.join(SIDES)}")
        if not self.eps > 0:
            raise ConfigError("eps", f"{self.eps} is not valid; give a number > 0")

    def inner(self, tensor: Tensor, rule: Rule) -> Rule:
        """``rule`` for matrices inside the network, Adam for all else."""
        if is_inner_matrix(tensor):
            return rule
        return of_optax(optax.scale_by_adam(self.b1, self.b2, self.eps), elementwise=True)

    def turned(self, matrix: jax.Array, like: jax.Array) -> jax.Array:
        """``matrix``, or its transpose where the side of ``like`` [d_in, d_out] that is projected
        is its second. Its own inverse."""
        d_in, d_out = like.shape
        first = {"in": True, "out": False, "smaller": d_in <= d_out, "larger": d_in > d_out}
        return matrix if first[self.side] else matrix.T

    def adam(self, moments: Moments, g: jax.Array, step: jax.Array) -> tuple[jax.Array, Moments]:
        """Adam's direction for ``g`` and the moments after it; ``step`` counts from 0."""
        mu = self.b1 * moments.mu + (1 - self.b1) * g
        nu = self.b2 * moments.nu + (1 - self.b2) * g**2
        t = step + 1
        unbiased = mu / (1 - self.b1**t), nu / (1 - self.b2**t)
        return unbiased[0] / (jnp.sqrt(unbiased[1]) + self.eps), Moments(mu, nu)

    def moments(self, matrix: jax.Array) -> Moments:
        """Zeros, for the projection of a matrix, or for the matrix where there is none."""
        side, other = self.turned(matrix, matrix).shape
        zeros = jnp.zeros((min(self.rank, side), other), matrix.dtype)
        return Moments(zeros, zeros)

    def is_full(self, turned: jax.Array) -> bool:
        """Whether there is nothing to project."""
        return turned.shape[0] <= self.rank


def leading(g: jax.Array, rank: int) -> jax.Array:
    """The ``rank`` leading left singular vectors [n, rank] of g [n, m], by its decomposition.

    The entry of largest magnitude in each is positive, so that they do not depend on who computes
    them.
    """
    u = linalg.svd(g.astype(jnp.float32))[0][:, :rank]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0)
    return (u * jnp.where(largest < 0, -1.0, 1.0)).astype(g.dtype)


def iterated(g: jax.Array, before: jax.Array, rounds: int) -> jax.Array:
    """Orthonormal [n, rank], near the leading singular vectors: subspace iteration from ``before``
    (Halko et al. 2011, algorithm 4.4, warm)."""
    g32, q = g.astype(jnp.float32), before.astype(jnp.float32)
    for _ in range(rounds):
        q = linalg.qr(g32 @ (g32.T @ q))[0]
    return q.astype(g.dtype)


def random_orthonormal(key: jax.Array, n: int, rank: int, dtype: Any) -> jax.Array:
    """[n, rank], uniform among the orthonormal ones (Haar), by QR of a normal matrix."""
    q, r = linalg.qr(jax.random.normal(key, (n, rank), jnp.float32))
    return (q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)).astype(dtype)


def limited(update: jax.Array, last: jax.Array, growth: float) -> tuple[jax.Array, jax.Array]:
    """The norm-growth limiter (Chen et al. 2024, "Fira", equation 8): an update whose norm is
    more than ``growth`` times the last one's is shortened to that. Returns it and its norm."""
    norm = jnp.linalg.norm(update)
    most = jnp.where(last > 0, growth * last, jnp.inf)
    factor = jnp.minimum(1.0, most / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    return update * factor, norm * factor
