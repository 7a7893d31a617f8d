"""SPAM (Huang et al. 2025, "SPAM: spike-aware Adam with momentum reset for stable LLM training",
algorithm 1)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxpt.errors import ConfigError
from jaxpt.optimizers.base import Optimizer, Rule, Tensor, check_shares, of_optax
from jaxpt.optimizers.groups import is_inner_matrix
from jaxpt.weights.support import Grouped

LEAST = 0.01  # of an update just after a reset, as in the authors' code


@dataclasses.dataclass(frozen=True)
class SPAM(Optimizer):
    """Adam that begins anew every ``period`` steps and cuts spikes entry by entry. With k steps
    since the last reset:

        m, v <- 0, 0                              where k = 0
        g    <- sign(g) sqrt(threshold v)         where g^2 > threshold v and k >= patience
        u    <- s_k Adam(g)
        s_k   = 1 - 0.99 (1 + cos(pi k / (warmup + 1))) / 2 for k <= warmup, 1 from there on

    The correction of Adam's bias goes on counting from the run's start, as published, so that
    after a reset updates are larger than Adam's: up to sqrt(1 / (1 - b2^k)) times. The first
    interval has no warm-up of its own (the schedule has one). An entry with v = 0, that of a token
    not seen since the reset, is no spike: cut to 0 it could not leave 0.

    With ``density`` 1 / n only one entry in every n consecutive ones of a row of the matrices
    inside the network is updated and has moments, [d_in, ceil(d_out / n)]. Which one is drawn at
    every reset, from a key: it is not kept.
    """

    clip: float | None = None  # greatest global norm of the gradient; None for no clipping
    threshold: float | None = 5000.0  # g^2 / v from which an entry is a spike; None: none is
    period: int | None = 500  # steps from one reset to the next; None: never
    warmup: int = 150  # steps of the warm-up after a reset
    patience: int = 20  # steps after a reset in which no spike is looked for
    density: float = 1.0  # share of the entries of inner matrices that are updated, 1 / n
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-6  # added to the root of the second moment
    seed: int = 0  # of the choice of entries

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "b1", "b2")
        if not self.eps > 0:
            raise ConfigError("eps", f"{self.eps} is not valid; give a number > 0")
        if self.threshold is not None and not self.threshold > 0:
            raise ConfigError(
                "threshold", f"{self.threshold} is not valid; give a number > 0, or None"
            )
        if self.period is not None and self.period < 1:
            raise ConfigError("period", f"{self.period} is not valid; give 1 or more, or None")
        for field in ("warmup", "patience"):
            if getattr(self, field) < 0:
                raise ConfigError(field, f"{getattr(self, field)} is not valid; give 0 or more")
        if not 0 < self.density <= 1 or not any(
            abs(self.density * n - 1) < 1e-3 for n in range(1, 257)
        ):
            raise ConfigError("density", f"{self.density} is not 1 / n for an n from 1 to 256")

    @property
    def rule_seed(self):
        return self.seed

    def rule(self, tensor: Tensor) -> Rule:
        rule = self._dense()
        if self.density < 1 and is_inner_matrix(tensor):
            return self._sparse(rule, Grouped(round(1 / self.density)))
        return rule

    def _dense(self) -> Rule:
        adam = of_optax(optax.scale_by_adam(self.b1, self.b2, self.eps))

        def update(g, state, param, step, key):
            since = step if self.period is None else step % self.period
            state = jax.tree.map(lambda x: jnp.where(since == 0, 0, x), state)
            u, state = adam.update(self._cut(g, state.nu, since), state, param, step, key)
            return u * self._warm(step, since).astype(u.dtype), state

        return Rule(adam.init, update, elementwise=True)

    def _sparse(self, rule: Rule, support: Grouped) -> Rule:
        """The rule for the entries of a matrix that its turn has come to."""

        def init(param):
            return rule.init(jnp.zeros(support.shape(*param.shape), param.dtype))

        def update(g, state, param, step, key):
            places = support.draw(self.interval_key(key, step), *g.shape)
            few = support.gather(g, places)
            u, state = rule.update(few, state, few, step, key)
            return support.spread(u, places, *g.shape), state

        return Rule(init, update)

    def interval_key(self, key: jax.Array, step: jax.Array) -> jax.Array:
        """Key of the choice of entries at a step."""
        return key if self.period is None else jax.random.fold_in(key, step // self.period)

    def _cut(self, g, v, since):
        if self.threshold is None:
            return g
        most = jnp.asarray(self.threshold, g.dtype) * v
        spike = (g**2 > most) & (v > 0) & (since >= self.patience)
        return jnp.where(spike, jnp.sign(g) * jnp.sqrt(most), g)

    def _warm(self, step, since):
        if self.period is None:
            return jnp.float32(1)
        share = jnp.minimum(since / (self.warmup + 1), 1)
        rising = 1 - (1 - LEAST) * (1 + jnp.cos(jnp.pi * share)) / 2
        return jnp.where(step < self.period, 1.0, rising)
