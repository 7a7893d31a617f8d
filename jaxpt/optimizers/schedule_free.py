"""Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled", algorithm 1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpt.errors import ConfigError
from jaxpt.optimizers.base import Optimizer, Rule, Tensor, check_shares, of_optax
from jaxpt.optimizers.eight_bit import in_eight_bits
from jaxpt.optimizers.rounding import rounded
from jaxpt.state import Params


@dataclasses.dataclass(frozen=True)
class ScheduleFree(Optimizer):
    """z <- z - lr (g / (sqrt(v / (1 - b2^t)) + eps) + weight_decay y)
    x <- (1 - c) x + c z       c = w_t / (w_1 + ... + w_t), w = (greatest lr so far)^power
    y <- b1 x + (1 - b1) z

    Gradients g are taken at y, which are the run's parameters; z is in the optimizer's state; x,
    the average, is what is evaluated, sampled and exported. The schedule needs a warm-up and no
    decay. Give other parameters to evaluate (``growth.Average``) or this, not both.
    """

    lr: float = 2.5e-3  # learning rate where the schedule is 1
    b1: float = 0.9  # share of the average in the point at which gradients are taken, above 0
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    power: float = 2.0  # of the learning rate, by which each z counts in the average

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "b1", "b2")
        if self.b1 == 0:
            raise ConfigError("b1", "0 is not valid: then nothing is known of the average")
        if not self.eps > 0:
            raise ConfigError("eps", f"{self.eps} is not valid; give a number > 0")
        if not self.power >= 0:
            raise ConfigError("power", f"{self.power} is not valid; give a number >= 0")

    def rule(self, tensor: Tensor) -> Rule:
        return of_optax(
            optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True)
        )

    def _complete(self, rule, treatment, rate, together=()) -> Rule:
        """The learning rate is inside: z takes the step, and the change is what it does to y."""
        eight = self.state_dtype == "8bit"
        rule = in_eight_bits(rule) if eight else rule
        dtype = jnp.dtype("float32" if eight else self.state_dtype)

        def around(count, key) -> optax.GradientTransformation:
            lr = jnp.asarray(rate(count) * treatment.lr_scale, dtype)

            def step(updates: Any, state: Any, params: Any = None):
                found, state = rule.update(updates, state, params, count, key)
                decay = jnp.asarray(treatment.weight_decay, dtype)
                return -lr * (found + decay * params), state

            base = optax.GradientTransformation(lambda params: rule.init(params), step)
            return optax.contrib.schedule_free(base, lr, self.b1, self.power)

        def init(param):
            return around(jnp.int32(0), None).init(param.astype(dtype))

        def update(grad, state, param, count, key):
            return around(count, key).update(grad.astype(dtype), state, param.astype(dtype))

        whole_rule = Rule(init, update, together=together)
        return rounded(whole_rule) if self.rounding == "stochastic" else whole_rule

    def eval_params(self, state, params: Params) -> Params:
        """x, the average, in the parameters' types; what is frozen as it is."""

        def average(param, own):
            if own is None:
                return param
            own = own._replace(b1=self.b1)  # of a stacked tensor, one number for all layers
            dtype = own.z.dtype
            x = optax.contrib.schedule_free_eval_params(own, param.astype(dtype))
            return x.astype(param.dtype)

        tree = jax.tree.structure(params)
        own = tree.flatten_up_to(state.states)
        return tree.unflatten(map(average, jax.tree.leaves(params), own))
