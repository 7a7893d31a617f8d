"""A matrix of which a few rows (or columns) are trained at a time: the gradient of all is never
made. ``optimizers/grass.py`` chooses which."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.weights.base import FROZEN, Scope, Weight, WeightModule, replaced
from jaxpt.weights.init import Constant
from jaxpt.weights.product import product

Side = Literal["smaller", "larger", "in", "out"]
KIND = "rows"  # of what is trained, in the table of tensors


@dataclasses.dataclass(frozen=True)
class Rows(Weight):
    """y = x (W + P delta): W [d_in, d_out] stays as it is, delta [rank, d_out] is trained, and P
    [d_in, rank] puts its rows, scaled, where ``rows`` says. (With the outputs' side columns of W
    and delta [d_in, rank] take their place.)

    The gradient of delta is P^T G for the gradient G of the matrix, and takes rank / d_in of G's
    arithmetic, memory and communication. So an optimizer of delta is one of W in that subspace.
    ``Grass`` makes it the published method: it chooses rows anew from time to time, and adds what
    delta has come to into W. By other optimizers the first rows, drawn at random, are trained.

    An average of the parameters over steps (``Average``) goes astray where it spans a choice.
    """

    rank: int = 128  # rows that are trained at a time
    side: Side = "smaller"  # side of the matrix of which some are chosen

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError("rank", f"{self.rank} is not valid; give 1 or more")
        if self.side not in ("smaller", "larger", "in", "out"):
            raise ConfigError("side", f"{self.side!r} is not one of smaller, larger, in, out")

    def of_inputs(self, d_in: int, d_out: int) -> bool:
        """Whether rows are chosen, which belong to inputs, and not columns."""
        first = {"in": True, "out": False, "smaller": d_in <= d_out, "larger": d_in > d_out}
        return first[self.side]

    def build(self, scope, d_in, d_out, axes, init):
        return RowsModule(self, scope, d_in, d_out, axes, init)

    def flops(self, d_in, d_out):
        return 2 * d_in * d_out + 2 * self.rank * (d_out if self.of_inputs(d_in, d_out) else d_in)

    def parameters(self, d_in, d_out):
        """Of delta."""
        return self.rank * (d_out if self.of_inputs(d_in, d_out) else d_in)


class RowsModule(WeightModule):
    """w: [d_in, d_out]. delta: [rank, d_out] or [d_in, rank].

    rows: int32 [rank], which rows (columns), distinct and in order; where fewer are chosen the
      last ones are numbers beyond the side.
    scales: float32 [2, rank], of each row in the gradient and in the matrix.
    squares: float32 [side], zeros; its "gradient" is the squared norm of every row of G.
    """

    def __init__(self, config: Rows, scope: Scope, d_in: int, d_out: int, axes, init):
        self.inputs = config.of_inputs(d_in, d_out)
        rank, side = config.rank, d_in if self.inputs else d_out
        if rank >= side:
            raise ConfigError("weights", f"{scope.name}: rank {rank} is not less than {side}")

        def matrix(key):
            return init(key, (d_in, d_out), d_in, d_out, jnp.dtype(scope.rules.dtype))

        self.w = scope.constant("w", (d_in, d_out), axes, matrix, scope.rules.dtype, kind=FROZEN)
        shape = (rank, d_out) if self.inputs else (d_in, rank)
        places = ("rank", axes[1]) if self.inputs else (axes[0], "rank")
        self.delta = scope.param("delta", shape, places, Constant(0.0), kind=KIND)
        self.rows = scope.constant(
            "rows", (rank,), (None,), lambda key: _drawn(key, side, rank), "int32"
        )
        ones, zeros = jnp.ones((2, rank)), jnp.zeros(side)
        self.scales = scope.constant(
            "scales", ones.shape, (None, None), lambda _: ones, "float32", kind=FROZEN
        )
        self.squares = scope.constant(
            "squares", zeros.shape, (None,), lambda _: zeros, "float32", kind=FROZEN
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        w, delta, rows, scales = self.w[...], self.delta[...], self.rows[...], self.scales[...]
        scales = scales[:, :, None] if self.inputs else scales
        # By the first scale in the gradient, by the second in the value.
        small = delta * scales[0].astype(delta.dtype)
        small += jax.lax.stop_gradient(delta * (scales[1] - scales[0]).astype(delta.dtype))
        if self.inputs:
            more = product(taken(x, rows), small)
        else:
            more = spread(product(x, small), rows, w.shape[1])
        return noted(product(x, w) + more, x, self.squares[...], self.inputs, len(rows))

    def dense(self) -> jax.Array:
        return merged(
            self.w[...], self.delta[...], self.rows[...], self.scales[1], inputs=self.inputs
        )

    def from_dense(self, matrix: jax.Array) -> RowsModule:
        return replaced(self, w=matrix, delta=jnp.zeros_like(self.delta[...]))


def merged(w, delta, rows, scale, *, inputs: bool) -> jax.Array:
    """w [d_in, d_out] with ``scale`` [R] times delta's rows (columns) added, in w's dtype."""
    w, delta = (w, delta) if inputs else (w.T, delta.T)
    added = spread((delta.astype(jnp.float32) * scale[:, None]).T, rows, len(w)).T
    full = (w.astype(jnp.float32) + added).astype(w.dtype)
    return full if inputs else full.T


def _drawn(key: jax.Array, side: int, rank: int) -> jax.Array:
    return jnp.sort(jax.random.permutation(key, side)[:rank])


# What is chosen of the last axis, and its transpose: gathers both.


def taken(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x [..., n] at ``rows`` [R] of its last axis: [..., R], 0 where a row is beyond it."""
    return _taken(x, rows, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _taken(x, rows, n):
    return x.at[..., rows].get(
        mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
    )


def spread(z: jax.Array, rows: jax.Array, n: int) -> jax.Array:
    """[..., n] with z [..., R] at ``rows`` and 0 elsewhere."""
    return _spread(z, rows, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _spread(z, rows, n):
    places = jnp.arange(len(rows), dtype=jnp.int32)
    slots = jnp.full(n, len(rows), jnp.int32)
    slots = slots.at[rows].set(places, mode="drop", unique_indices=True, indices_are_sorted=True)
    return z.at[..., slots].get(mode="fill", fill_value=0)


_taken.defvjp(
    lambda x, rows, n: (_taken(x, rows, n), rows),
    lambda n, rows, g: (_spread(g, rows, n), None),
)
_spread.defvjp(
    lambda z, rows, n: (_spread(z, rows, n), rows),
    lambda n, rows, g: (_taken(g, rows, n), None),
)


# The norms of the rows of a gradient that is not made.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def noted(y, x, squares, inputs: bool, chunk: int) -> jax.Array:
    """y = x W itself. In the backward pass the "gradient" of ``squares`` [side] is the squared
    norm of each row (column) of W's gradient, of which ``chunk`` rows are made at a time."""
    return y


def _noted_forward(y, x, squares, inputs, chunk):
    return y, x


def _noted_backward(inputs, chunk, x, g):
    side = (x if inputs else g).shape[-1]
    tokens = tuple(range(x.ndim - 1))

    def part(i, squares):
        # Slices end with the axis: of a last chunk beyond it both begin where others have been.
        start = i * chunk
        some = jax.lax.dynamic_slice_in_dim(x if inputs else g, start, chunk, axis=-1)
        rows = jax.lax.dot_general(
            some,
            g if inputs else x,
            ((tokens, tokens), ((), ())),
            preferred_element_type=jnp.float32,
        )
        found = jnp.sum(jnp.square(rows), axis=1)
        return jax.lax.dynamic_update_slice_in_dim(squares, found, start, axis=0)

    squares = jax.lax.fori_loop(0, -(-side // chunk), part, jnp.zeros(side, jnp.float32))
    return g, None, squares


noted.defvjp(_noted_forward, _noted_backward)
