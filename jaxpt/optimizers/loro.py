"""LORO (Mo et al. 2025, "Parameter and memory efficient pretraining via low-rank Riemannian
optimization", algorithm 1): the two factors of a low-rank matrix, updated as one.

With W = A B, A [n, r], B [r, m], and the gradients dA = G B^T, dB = A^T G of the factors, where G
is that of W (never formed). The paper writes B A for our A B. Every ``period``-th step, of length
eta, is exact:

    A = Q_A R_A,   B^T = Q_B R_B                                     QR decompositions
    Z_A = dA R_B^-1 = G Q_B,   Z_B = dB^T R_A^-1 = G^T Q_A
    Z_A - Q_A Q_A^T Z_A = Q'_A R'_A,   Z_B - Q_B Q_B^T Z_B = Q'_B R'_B
    [ R_A R_B^T - eta Z_B^T Q_B    -eta R'_B^T ]
    [ -eta R'_A                     0          ]  ~=  U S V^T        the r largest singular values
    A <- (Q_A, Q'_A) U S^1/2,   B <- S^1/2 V^T (Q_B, Q'_B)^T

so that A B becomes the nearest matrix of rank r to W - eta P(G), with P the projection to the
tangent space of such matrices at W (equation 10). Between these it is approximate (equation 12):

    A <- A - eta (r / n) dA,   B <- B - eta (r / m) dB

As in the authors' runs Adam's directions for dA and dB stand in their place, in both.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxpt.errors import ConfigError
from jaxpt.optimizers.base import Optimizer, Rule, Tensor, check_shares, of_optax
from kernels import linalg

Pair = dict[str, jax.Array]  # a: [n, r], b: [r, m]


@dataclasses.dataclass(frozen=True)
class LORO(Optimizer):
    """For ``LowRank`` weights; all else is trained by Adam. See the file's head for the update.

    ``weight_decay`` shrinks both factors, after the step. Factors have to have full rank: those
    that begin as zeros have no exact step.
    """

    period: int = 500  # steps from one exact step to the next
    adam: bool = True  # Adam's directions in the place of the factors' gradients
    reset: bool = True  # whether all moments begin anew after an exact step, as in their runs
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "b1", "b2")
        if self.period < 1:
            raise ConfigError("period", f"{self.period} is not valid; give 1 or more")
        if not self.eps > 0:
            raise ConfigError("eps", f"{self.eps} is not valid; give a number > 0")

    def rule(self, tensor: Tensor) -> Rule:
        return Rule(self._adam.init, self._direction, elementwise=True)

    @property
    def _adam(self) -> Rule:
        return of_optax(optax.scale_by_adam(self.b1, self.b2, self.eps))

    def _direction(self, grad, state, param, count, key):
        """(Adam's direction, state) of one array."""
        if self.reset:
            begins = count % self.period == 0
            state = jax.tree.map(lambda s: jnp.where(begins, 0, s), state)
            count = count % self.period
        return self._adam.update(grad, state, param, count, key)

    def joint(self, tensors, rate):
        if {t.weight for t in tensors.values()} != {"LowRank"} or tensors.keys() != {"a", "b"}:
            return None

        def init(params: Pair):
            return {name: self._adam.init(p) if self.adam else None for name, p in params.items()}

        def update(grads: Pair, states, params: Pair, count, key):
            if self.adam:
                found = {
                    n: self._direction(grads[n], states[n], params[n], count, key) for n in grads
                }
                grads, states = ({n: pair[i] for n, pair in found.items()} for i in range(2))
            eta = rate(count).astype(params["a"].dtype)
            exactly = (count + 1) % self.period == 0
            return jax.lax.cond(exactly, exact, approximate, params, grads, eta), states

        return Rule(init, update)


def approximate(params: Pair, grads: Pair, eta: jax.Array) -> Pair:
    """The changes of an approximate step of length ``eta``."""
    rank = params["b"].shape[0]
    return {
        name: -eta * (rank / params[name].shape[axis]) * grads[name]
        for name, axis in (("a", 0), ("b", 1))
    }


def exact(params: Pair, grads: Pair, eta: jax.Array) -> Pair:
    """The changes of an exact step of length ``eta``; float32 at least."""
    dtype = jnp.promote_types(params["a"].dtype, jnp.float32)
    with jax.default_matmul_precision("float32"):
        a, b = params["a"].astype(dtype), params["b"].astype(dtype).T
        new_a, new_b = _retracted(a, b, grads["a"].astype(dtype), grads["b"].astype(dtype).T, eta)
    changes = {"a": new_a - a, "b": (new_b - b).T}
    return {name: change.astype(params[name].dtype) for name, change in changes.items()}


def _retracted(a, b, da, db, eta):
    """A [n, r] and B^T [m, r] after the step, from their gradients."""
    rank = a.shape[1]
    (q_a, r_a), (q_b, r_b) = linalg.qr(a), linalg.qr(b)
    z_a, z_b = _over(da, r_b), _over(db, r_a)
    more_a, s_a = linalg.qr(z_a - q_a @ (q_a.T @ z_a))
    more_b, s_b = linalg.qr(z_b - q_b @ (q_b.T @ z_b))
    core = r_a @ r_b.T - eta * (z_b.T @ q_b)
    core = jnp.block([[core, -eta * s_b.T], [-eta * s_a, jnp.zeros_like(core)]])
    u, s, vt = linalg.svd(core)
    u, v, root = u[:, :rank], vt[:rank].T, jnp.sqrt(s[:rank])
    left, right = jnp.hstack([q_a, more_a]) @ u, jnp.hstack([q_b, more_b]) @ v
    # Singular vectors have no sign of their own: the largest entry on the left is positive.
    largest = jnp.take_along_axis(left, jnp.argmax(jnp.abs(left), axis=0)[None], axis=0)
    root = root * jnp.where(largest < 0, -1.0, 1.0)
    return left * root, right * root


def _over(z: jax.Array, r: jax.Array) -> jax.Array:
    """z r^-1, with r upper triangular."""
    return linalg.solve_triangular(r, z.T, transposed=True).T
