"""What an optimizer is: a frozen config over optax, with parameter groups and a schedule.

To add one, write a file with a dataclass that derives from ``Optimizer`` and gives the rule for one
array (``rule``), or for all arrays of a weight (``joint``); clipping, groups, weight decay and the
learning rate come from here. One row in ``tests/test_optimizers.py`` tests it.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Collection, Container, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxpt.errors import ConfigError
from jaxpt.optimizers.eight_bit import in_eight_bits
from jaxpt.optimizers.groups import Group, Tensors, Treatment, resolve
from jaxpt.optimizers.rounding import rounded
from jaxpt.optimizers.rules import Rule, by_tensor, gathered, of_optax, one_layer
from jaxpt.optimizers.schedules import Constant, InSteps, Schedule, StepFunction
from jaxpt.paths import map_with_path
from jaxpt.state import Params, whole
from jaxpt.weights.base import Tensor

__all__ = [
    "Group",
    "Optimizer",
    "Rule",
    "StateType",
    "StepFunction",
    "Tensor",
    "Tensors",
    "of_optax",
]

StateType = Literal["float32", "bfloat16"]
Held = Literal["float32", "bfloat16", "8bit"]
# (parameters, updates made so far, paths -> their gradients by path) -> parameters; the gradients
# are those of the total loss of the batch that the step is about to be made on.
Gradients = Callable[[Collection[str]], dict[str, jax.Array]]
Before = Callable[[Params, jax.Array, Gradients], Params]
Rounding = Literal["nearest", "stochastic"]


class Built(optax.GradientTransformationExtraArgs):
    """An optimizer's transformation over nested dicts, with state ``ByTensor``.

    rules: path -> what makes of a gradient the change of one array, learning rate and decay
      included; without what is frozen. For steps that update one layer at a time. What is updated
      as one shares a rule.
    clip: greatest global norm of the gradient, which such steps must see to themselves; or None.
    seed: of the rules' keys.
    start: updates made before the phase: the phase's step is the state's count less this.
    rate: learning rate after so many updates.
    rates: path -> learning rate after so many updates, of what is not frozen.
    before: what a step begins with, before its gradients; or None.

    ``update`` takes, beside gradients, state and parameters, ``norm``: the global norm of what is
    trained of the gradients, where that is known.
    """

    rules: dict[str, Rule]
    clip: float | None
    seed: int
    start: int = 0
    rate: StepFunction | None = None
    rates: Mapping[str, StepFunction] = types.MappingProxyType({})
    before: Before | None = None

    @classmethod
    def of(
        cls,
        transform: optax.GradientTransformation,
        rules: dict[str, Rule],
        clip: float | None,
        seed: int,
    ) -> Built:
        def update(updates, state, params=None, norm=None, **_):
            if clip is not None:
                trained = map_with_path(lambda path, g: g if path in rules else None, updates)
                norm = optax.tree.norm(trained) if norm is None else norm
                updates = whole(clipped(trained, norm, clip), updates)
            return transform.update(updates, state, params)

        built = cls(transform.init, update)
        built.rules, built.clip, built.seed = rules, clip, seed
        return built


def clipped(grads: Any, norm: jax.Array, most: float) -> Any:
    """Gradients of this global norm, shortened to ``most`` where they are longer."""
    short = norm < most
    return jax.tree.map(lambda g: jnp.where(short, g, (g / norm.astype(g.dtype)) * most), grads)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Config of an optimizer; subclasses live in a file each in ``jaxpt/optimizers``.

    One update of parameter p with gradient g, in this order:

        g     <- g * min(1, clip / ||all g||)      global norm over what is trained
        u     <- rule(g, p)                        the optimizer's own, array by array
        u     <- u + weight_decay * p              decoupled (Loshchilov and Hutter 2019, alg. 2)
        p     <- p - lr * schedule(step) * lr_scale * u

    The arithmetic and the state are in ``state_dtype``, whatever the parameters are in;
    ``optax.apply_updates`` rounds the sum to the parameter's type. With "8bit" the moments of
    arrays of 4096 entries or more are held in 8 bits (``eight_bit.py``), and all else is float32.

    Of a bfloat16 parameter a change below 1/512 of it is lost by rounding to the nearest number,
    every time; by "stochastic" ``rounding`` (``rounding.py``) it is there on average.
    """

    lr: float = 1e-3  # learning rate where the schedule is 1
    # multiplier of the learning rate over the phase's steps
    schedule: Schedule = dataclasses.field(default_factory=Constant)
    weight_decay: float = 0.0  # pull of matrices towards 0, as a share of lr
    clip: float | None = 1.0  # greatest global norm of the gradient; None for no clipping
    groups: tuple[Group, ...] = ()  # parameters that are treated otherwise; the first match wins
    state_dtype: Held = "float32"  # type of the optimizer's state and arithmetic
    rounding: Rounding = "nearest"  # of bfloat16 parameters after an update

    def __post_init__(self):
        if not self.lr > 0:
            raise ConfigError("lr", f"{self.lr} is not valid; give a number > 0")
        if not self.weight_decay >= 0:
            raise ConfigError("weight_decay", f"{self.weight_decay} is not valid; give >= 0")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError("clip", f"{self.clip} is not valid; give a norm > 0, or None")
        if self.state_dtype not in get_args(Held):
            known = ", ".join(get_args(Held))
            raise ConfigError("state_dtype", f"{self.state_dtype!r} is not one of {known}")
        if self.rounding not in get_args(Rounding):
            raise ConfigError("rounding", f"{self.rounding!r} is not nearest or stochastic")

    def rule(self, tensor: Tensor) -> Rule:
        """How one array is updated: gradient -> direction (not negated, without lr).

        Args:
          tensor: its row in the model's table; of stacked tensors, that of one layer.
        """
        raise NotImplementedError

    @property
    def rule_seed(self) -> int:
        """Of the keys that rules get."""
        return 0

    def joint(self, tensors: Mapping[str, Tensor], rate: StepFunction) -> Rule | None:
        """How the arrays of one weight are updated as one: gradients -> changes, to be added.

        Args:
          tensors: name -> row of the table, of the weight's tensors that are trained (two or
            more); of stacked ones, that of one layer. They are the keys of the rule's dicts.
          rate: the learning rate after so many updates.

        Returns:
          The rule; None where each tensor goes by ``rule``.
        """
        return None

    def before(self, tensors: Tensors, trained: Container[str]) -> Before | None:
        """A transform of the parameters that every step begins with, where one is needed.

        Args:
          tensors: the model's table.
          trained: paths of what is not frozen.
        """
        return None

    def learning_rate(self, total_steps: int | None, in_steps: InSteps) -> StepFunction:
        """lr * schedule, a function of the phase's step.

        Args:
          total_steps: steps of the phase; None where they are not known beforehand.
          in_steps: a duration in steps of the phase, None where it cannot be known.

        Raises:
          ConfigError: a schedule that needs a length which is not known, or does not fit into it.
        """
        try:
            multiplier = self.schedule.build(total_steps, in_steps)
        except ConfigError as error:
            raise error.within("schedule") from None
        return lambda step: jnp.float32(self.lr) * multiplier(step)

    def build(
        self,
        tensors: Tensors,
        learning_rate: StepFunction,
        start: int = 0,
        scales: Mapping[str, float] = types.MappingProxyType({}),
    ) -> Built:
        """The transformation over nested dicts of parameters.

        Frozen parameters have no state and an update of zeros.

        Args:
          tensors: the model's table; its paths are those of the parameters.
          learning_rate: of the phase's step.
          start: updates made before this phase, if the optimizer's state is kept from the phase
            before: ``learning_rate`` gets the update count less ``start``. 0 with a fresh state.
          scales: path -> factor of the learning rate that the model asks for, beside the groups';
            the pull of weight decay, lr * weight_decay, stays as it is.

        Raises:
          ConfigError: a group that no parameter belongs to, or that parts what is updated as one.
        """
        treatments = resolve(self.groups, self.weight_decay, tensors)
        treatments |= {path: treatments[path].scaled(by) for path, by in scales.items()}

        def rate(count):
            return learning_rate(jnp.maximum(count - start, 0))

        rules = {
            path: self._complete(self.rule(one_layer(tensors[path])), treatment, rate)
            for path, treatment in treatments.items()
            if not treatment.frozen
        }
        rules |= self._joint_rules(tensors, {path: treatments[path] for path in rules}, rate)
        in_turn, seed = self.state_dtype == "8bit", self.rule_seed
        transform = by_tensor(tensors, rules, seed, in_turn=in_turn)
        built = Built.of(transform, rules, self.clip, seed)
        built.start, built.before = start, self.before(tensors, rules)
        built.rate = rate
        built.rates = {path: _scaled(rate, treatments[path].lr_scale) for path in rules}
        return built

    def _joint_rules(self, tensors: Tensors, treatments: dict[str, Treatment], rate: StepFunction):
        """Path -> rule, of the weights whose arrays are updated as one."""
        weights: dict[str, list[str]] = {}
        for path in treatments:
            weights.setdefault(path.rpartition("/")[0], []).append(path)
        rules: dict[str, Rule] = {}
        for paths in weights.values():
            own = treatments[paths[0]]
            rows = gathered({path: one_layer(tensors[path]) for path in paths}, tuple(paths))
            rule = self.joint(rows, _scaled(rate, own.lr_scale)) if len(paths) > 1 else None
            if rule is None:
                continue
            if any(treatments[path] != own for path in paths):
                message = "are updated as one: they need the same lr_scale and weight_decay"
                raise ConfigError("groups", f"{', '.join(paths)} {message}")
            rules |= dict.fromkeys(paths, self._complete(rule, own, rate, tuple(paths)))
        return rules

    def _complete(
        self, rule: Rule, treatment: Treatment, rate: StepFunction, together: tuple[str, ...] = ()
    ) -> Rule:
        """The rule with decay and learning rate: gradient -> change."""
        eight = self.state_dtype == "8bit"
        rule = in_eight_bits(rule) if eight else rule
        dtype = jnp.dtype("float32" if eight else self.state_dtype)

        def held(tree):
            return jax.tree.map(lambda x: x.astype(dtype), tree)

        def update(grad, state, param, count, key):
            param = held(param)
            found, state = rule.update(held(grad), state, param, count, key)
            length = -(rate(count) * treatment.lr_scale).astype(dtype)

            def change(u, p):
                decay = (
                    jnp.asarray(treatment.weight_decay, dtype) * p if treatment.weight_decay else 0
                )
                return u + length * decay if together else length * (u + decay)

            return jax.tree.map(change, found, param), state

        whole_rule = Rule(lambda p: rule.init(held(p)), update, rule.elementwise, together)
        return rounded(whole_rule) if self.rounding == "stochastic" else whole_rule

    def eval_params(self, state: Any, params: Params) -> Params:
        """The parameters to evaluate, sample and export with; ``params`` unless overridden.

        ``state`` is that of the built transformation.
        """
        return params


def _scaled(rate: StepFunction, scale: float) -> StepFunction:
    return lambda count: rate(count) * scale


def check_shares(config: Any, *fields: str) -> None:
    """Raises ConfigError unless each of these fields lies in [0, 1)."""
    for field in fields:
        value = getattr(config, field)
        if not 0 <= value < 1:
            raise ConfigError(field, f"{value} is not valid; give a number in [0, 1)")
