"""Grass (Muhamed et al. 2024, "Grass: compute efficient low-memory LLM training with structured
sparse gradients", algorithm 1): Adam for some rows of each gradient.

For the gradient G [n, m] of a matrix W, with P [n, r] made of r of the identity's columns, scaled:
at every ``period``-th step these are chosen by the norms of G's rows, and at each step

    R = P^T G [r, m],   N = Adam's direction for R,   u = scale P N

The moments of Adam are [r, m]. P is of one of these kinds (section 3.3), with q the probabilities
of the rows, proportional to |G_i| (``norm``), |G_i|^2 (``square``) or nothing (``uniform``):

    top            the r rows of the largest norm, P of ones
    norm, ...      rows drawn by q with replacement, scaled by 1 / sqrt(r q_i)

By the latter P P^T G is G on average. A row that is drawn c times has one place in R: its copies
would have equal moments, so that it counts c times where P N goes back. (No two of the indices are
equal then, and they are in order.) Without replacement, the scale is 1 / sqrt(p_i) with p_i the
chance that the row is drawn, n / r for all in ``uniform``, else given the first row that is not
(Cohen and Kaplan 2007, "Summarizing data using bottom-k sketches", section 4): so it is unbiased
too. No q is below 1e-4 / n, which keeps the scales at bay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.optimizers.base import Rule, Tensor
from jaxpt.optimizers.groups import Tensors
from jaxpt.optimizers.projection import Moments, Projected
from jaxpt.optimizers.rules import keys_of
from jaxpt.state import Params, flatten, unflatten
from jaxpt.weights.rows import KIND, merged, spread

Choice = Literal["top", "norm", "square", "uniform"]
LEAST = 1e-4  # least probability of a row, times the number of rows


class Chosen(NamedTuple):
    """rows: int32 [r], distinct and in order; where fewer are chosen, the last are n and more.

    scales: float32 [2, r], of each row in P^T G and in P N; None where all are 1.
    """

    rows: jax.Array
    scales: jax.Array | None


class InRows(NamedTuple):
    """chosen: None where nothing is projected."""

    chosen: Chosen | None
    moments: Moments


@dataclasses.dataclass(frozen=True)
class Grass(Projected):
    """See the file's head for the update.

    Of a ``Dense`` matrix the whole gradient is made, and ``rank`` of its rows are used. Held as
    ``Rows(rank)`` (jaxpt/weights/rows.py) only those are made, and summed over the mesh: the same
    method, but that weight decay does not reach it, and that clipping sees R and not G. At a step
    that chooses, the loss is then differentiated once more before, for the norms; where the step
    accumulates micro-batches, by the sum of the squares of theirs.
    """

    choice: Choice = "top"  # how rows are chosen: by norm, or drawn with these probabilities
    replace: bool = True  # whether rows are drawn with replacement
    scale: float = 1.0  # of what comes back from the rows
    reset: bool = True  # whether moments begin anew with each choice
    seed: int = 0  # of the draws

    def __post_init__(self):
        super().__post_init__()
        if self.choice not in ("top", "norm", "square", "uniform"):
            raise ConfigError("choice", f"{self.choice!r} is not top, norm, square or uniform")
        if not self.scale > 0:
            raise ConfigError("scale", f"{self.scale} is not valid; give a number > 0")

    def rule(self, tensor: Tensor) -> Rule:
        if tensor.weight == KIND:
            return Rule(self._init_rows, self._update_rows, elementwise=True)
        return self.inner(tensor, Rule(self._init, self._update))

    @property
    def rule_seed(self):
        return self.seed

    # Of a matrix with a whole gradient.

    def _init(self, matrix: jax.Array) -> InRows:
        turned = self.turned(matrix, matrix)
        if self.is_full(turned):
            return InRows(None, self.moments(matrix))
        rows = jnp.arange(self.rank, dtype=jnp.int32)
        scales = None if self.choice == "top" else jnp.ones((2, self.rank))
        return InRows(Chosen(rows, scales), self.moments(matrix))

    def _update(self, g, state: InRows, param, step, key):
        del param
        turned = self.turned(g, g)
        if state.chosen is None:
            u, moments = self.adam(state.moments, turned, step)
            return self.turned(u, g), InRows(None, moments)
        rows, scales = chosen = jax.lax.cond(
            step % self.period == 0,
            lambda: self.chosen(squared_norms(turned), self.rank, jax.random.fold_in(key, step)),
            lambda: state.chosen,
        )
        low = turned.at[rows].get(
            mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
        )
        if scales is not None:
            low = low * scales[0][:, None].astype(g.dtype)
        n, moments = self._update_rows(low, state.moments, None, step, key)
        if scales is not None:
            n = n * scales[1][:, None].astype(g.dtype)
        return self.turned(spread(n.T, rows, len(turned)).T, g), InRows(chosen, moments)

    # Of the rows alone.

    def _init_rows(self, delta: jax.Array) -> Moments:
        return Moments(jnp.zeros_like(delta), jnp.zeros_like(delta))

    def _update_rows(self, low, moments: Moments, param, step, key):
        """(direction of R's shape, moments)."""
        del param, key
        if self.reset:
            begins = step % self.period == 0
            moments = jax.tree.map(lambda m: jnp.where(begins, 0, m), moments)
            step = step % self.period
        n, moments = self.adam(moments, low, step)
        return self.scale * n, moments

    def chosen(self, squares: jax.Array, rank: int, key: jax.Array) -> Chosen:
        """``rank`` rows, given the squared norms [n] of all."""
        n = len(squares)
        if self.choice == "top":
            return Chosen(jnp.sort(jax.lax.top_k(squares, rank)[1]).astype(jnp.int32), None)
        weights = {"norm": jnp.sqrt(squares), "square": squares, "uniform": jnp.ones(n)}
        q = weights[self.choice].astype(jnp.float32)
        q = jnp.maximum(q / jnp.maximum(q.sum(), jnp.finfo(jnp.float32).tiny), LEAST / n)
        q = q / q.sum()
        draw = with_replacement if self.replace else without_replacement
        return draw(q, rank, key, even=self.choice == "uniform")

    # Of weights that are held as ``Rows``.

    def before(self, tensors: Tensors, trained: Container[str]):
        weights = [
            path.removesuffix("/delta")
            for path, tensor in tensors.items()
            if tensor.weight == KIND and path in trained
        ]
        if weights and self.weight_decay:
            raise ConfigError("weight_decay", f"{self.weight_decay} does not reach Rows; give 0")
        if not weights:
            return None

        def before(params: Params, count: jax.Array, gradients) -> Params:
            flat, due = flatten(params), count % self.period == 0

            def keep():
                return {w: (flat[f"{w}/rows"], flat[f"{w}/scales"]) for w in weights}

            def choose():
                found = gradients([f"{weight}/squares" for weight in weights])
                new = {
                    w: self._choose(w, found[f"{w}/squares"], tensors, count, flat) for w in weights
                }
                # Of numbers that are not finite nothing is chosen: the step will be left out.
                sums = [jnp.sum(squares) for squares in found.values()]
                finite = jnp.isfinite(jnp.stack(sums)).all()
                new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, keep())
                return new, finite

            chosen, due = jax.lax.cond(due, choose, lambda: (keep(), jnp.bool_(False)))
            for weight in weights:
                flat |= _merged(weight, flat, tensors, due)
                flat[f"{weight}/rows"], flat[f"{weight}/scales"] = chosen[weight]
            return unflatten(flat)

        return before

    def _choose(self, weight: str, squares, tensors: Tensors, count, flat):
        """(rows, scales) of a weight, or of all its layers."""
        tensor, rank = tensors[f"{weight}/w"], tensors[f"{weight}/rows"].shape[-1]

        def one(squares, key):
            rows, scales = self.chosen(squares, rank, jax.random.fold_in(key, count))
            return rows, jnp.ones((2, rank)) if scales is None else scales

        keys = keys_of(f"{weight}/w", tensor, self.seed)
        return (jax.vmap(one) if tensor.stacked else one)(squares, keys)


def squared_norms(matrix: jax.Array) -> jax.Array:
    """Squared norms [n] of the rows of a matrix [n, m], float32."""
    return jnp.sum(jnp.square(matrix.astype(jnp.float32)), axis=1)


def with_replacement(q: jax.Array, rank: int, key: jax.Array, *, even: bool) -> Chosen:
    """``rank`` draws by the probabilities q [n]."""
    del even
    drawn = jax.random.categorical(key, jnp.log(q), shape=(rank,))
    rows, counts = jnp.unique(drawn, size=rank, fill_value=len(q), return_counts=True)
    held = counts > 0
    scale = jnp.where(held, 1 / jnp.sqrt(rank * q.at[rows].get(mode="fill", fill_value=1)), 0)
    rows = jnp.where(held, rows, len(q) + jnp.arange(rank))
    return Chosen(rows.astype(jnp.int32), jnp.stack([scale, counts * scale]))


def without_replacement(q: jax.Array, rank: int, key: jax.Array, *, even: bool) -> Chosen:
    """``rank`` rows drawn one after the other by the probabilities q [n] of those that are left.

    As the rows of the smallest of independent exponential times of rates q.
    """
    times = jax.random.exponential(key, q.shape) / q
    smallest, rows = jax.lax.top_k(-times, rank + 1)
    rows = jnp.sort(rows[:rank])
    chance = rank / len(q) if even else -jnp.expm1(q[rows] * smallest[rank])
    scale = jnp.broadcast_to(1 / jnp.sqrt(chance), (rank,))
    return Chosen(rows.astype(jnp.int32), jnp.stack([scale, scale]))


def _merged(weight: str, flat: dict[str, jax.Array], tensors: Tensors, due: jax.Array):
    """w and delta of a weight, by path: where it is ``due``, delta is added to w and is 0.

    In a loop of as many rounds as there are layers, or none, so that nothing is copied.
    """
    paths = [f"{weight}/{name}" for name in ("w", "delta", "rows", "scales")]
    w, delta, rows, scales = (flat[path] for path in paths)
    inputs = delta.shape[-1] == w.shape[-1]
    stacked = tensors[paths[0]].stacked
    if not stacked:
        w, delta, rows, scales = w[None], delta[None], rows[None], scales[None]

    def layer(i, carry):
        w, delta = carry
        full = merged(w[i], delta[i], rows[i], scales[i, 1], inputs=inputs)
        full = jax.lax.optimization_barrier(full)
        put = jax.lax.dynamic_update_index_in_dim
        return put(w, full, i, 0), put(delta, jnp.zeros_like(delta[0]), i, 0)

    w, delta = jax.lax.fori_loop(0, jnp.where(due, len(w), 0), layer, (w, delta))
    return {paths[0]: w if stacked else w[0], paths[1]: delta if stacked else delta[0]}
