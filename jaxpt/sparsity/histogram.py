"""How many weights are nearly 0 while a model trains (Jaiswal et al. 2023, "The Emergence of
Essential Sparsity in Large Pre-trained Models: The Weights that Matter")."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.growth import periodic
from jaxpt.growth.base import Update
from jaxpt.state import flatten


@dataclasses.dataclass(frozen=True)
class NearZero(Update):
    """Adds "near_zero/EDGE" to the metrics for each of ``edges``: the share of the entries of all
    matrices that are below it in magnitude. Differences of neighbours are a histogram.

    Measured at every ``every``-th step and said of those that follow, of the matrices that weights
    stand for: entries that a mask leaves out are 0. Changes nothing.
    """

    every: int = 100  # steps between two measurements
    edges: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)  # magnitudes, rising

    def __post_init__(self):
        periodic.check_every(self.every)
        if not self.edges or list(self.edges) != sorted(self.edges) or self.edges[0] <= 0:
            raise ConfigError("edges", f"{self.edges} are not rising magnitudes above 0")

    @property
    def needs_gradients(self):
        return False

    def init(self, model, params, key):
        return jnp.zeros(len(self.edges), jnp.float32)

    def bind(self, model, optimizer):
        def update(state, grads, key):
            old = state.extra[self.name]
            shares = jax.lax.cond(
                (state.opt_state.count - optimizer.start) % self.every == 1 % self.every,
                lambda params: self.shares(model, params),
                lambda params: old,
                state.params,
            )
            return dataclasses.replace(state, extra=state.extra | {self.name: shares})

        return update

    def shares(self, model, params) -> jax.Array:
        """[edges]: the share of the matrices' entries below each."""
        flat, total = flatten(params), 0
        below = jnp.zeros(len(self.edges), jnp.float32)
        for place in periodic.weights(model, lambda _: True):
            product = place.product
            assert product is not None
            own = {name: flat[path] for name, path in place.paths.items()}

            def one(own, product=product):
                sizes = jnp.abs(product.module(own).dense())
                return jnp.stack([jnp.sum(sizes < e, dtype=jnp.float32) for e in self.edges])

            below += jax.lax.map(one, own).sum(0) if place.stacked else one(own)
            total += product.d_in * product.d_out * product.stack
        return below / max(total, 1)

    def metrics(self, model, state):
        shares = state.extra[self.name]
        return {f"near_zero/{edge:g}": shares[i] for i, edge in enumerate(self.edges)}
