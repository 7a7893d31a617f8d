"""ReLoRA (Lialin et al. 2023, "ReLoRA: High-Rank Training Through Low-Rank Updates", algorithm 1):
the sum of many updates of a low rank has a high one."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxpt.errors import ConfigError
from jaxpt.growth import periodic
from jaxpt.growth.base import Transition, Update
from jaxpt.growth.periodic import Change, Place
from jaxpt.growth.reset_moments import Resetting
from jaxpt.optimizers.schedules import Restarts
from jaxpt.state import flatten, unflatten
from jaxpt.weights.lora import LoRA
from jaxpt.weights.module import split


@dataclasses.dataclass(frozen=True)
class ReLoRA(Update, Resetting):
    """Every ``every`` updates of the phase, for every ``LoRA`` weight W0 + (alpha / rank) A B:

        W0 <- W0 + (alpha / rank) A B       (to the rounding of W0's type: ``LoRAModule.merged``)
        A  <- drawn anew,  B <- 0
        the optimizer's states of A and B, and of nothing else, begin anew: see ``Resetting``

    all in the train step, and the learning rate rises anew: the phase's schedule has to be
    ``Restarts`` with the same ``every``. (The paper trains all of the model first: that is a phase
    before, of ``Dense`` weights, from which ``Convert`` leads here.) ``Restart`` does the same at
    a phase's start.
    """

    every: int = 1000  # updates between two restarts

    def __post_init__(self):
        super().__post_init__()
        periodic.check_every(self.every)

    @property
    def needs_gradients(self):
        return False

    def validate(self, phase):
        periodic.check_no_average(phase)
        schedule = phase.optimizer.schedule
        if not isinstance(schedule, Restarts) or schedule.every != self.every:
            raise ConfigError(
                "every",
                f"the learning rate does not rise anew every {self.every} steps; give the "
                f"optimizer schedule=Restarts(..., every={self.every})",
            )

    def init(self, model, params, key):
        return {}

    def bind(self, model, optimizer):
        places = _places(model)
        self.check(optimizer, [_factors(place) for place in places], model)
        return periodic.periodically(optimizer, self.every, places, _restart(self, optimizer))


@dataclasses.dataclass(frozen=True)
class Restart(Transition, Resetting):
    """``ReLoRA``'s restart, once, at the start of a phase.

    With ``keep_optimizer`` the states of the factors alone begin anew, else all do. The learning
    rate rises as the phase's own schedule begins.
    """

    def validate(self, old, new):
        if old.tensors != new.tensors:
            raise ConfigError("", "the model changes in this phase; give Convert before or after")
        _places(new)

    def __call__(self, params, old, new, key):
        flat = flatten(params)
        merged, _ = periodic.changed(_places(new), flat, dict.fromkeys(flat), _merge, key)
        return unflatten(merged)

    def optimizer_state(self, state, params, model, optimizer, key):
        places = [_factors(place) for place in _places(model)]
        self.check(optimizer, places, model)

        def change(place, params, states, key):
            return params, self.states(optimizer, place, params, states, key)

        known = periodic.states_of(state, params)
        _, states = periodic.changed(places, flatten(params), known, change, key)
        return periodic.with_states(state, params, states)


def _restart(resetting: Resetting, optimizer: Any) -> Change:
    def change(place, params, states, key):
        params, states = _merge(place, params, states, key)
        factors = _factors(place)
        mine = {name: states[name] for name in factors.names}
        return params, states | resetting.states(optimizer, factors, params, mine, key)

    return change


def _merge(place, params, states, key):
    return split(place.product.module(params).merged(key))[1], states


def _places(model: Any) -> list[Place]:
    found = periodic.weights(model, lambda product: isinstance(product.weight, LoRA))
    if not found:
        raise ConfigError("", "the model has no LoRA weight")
    return found


def _factors(place: Place) -> Place:
    return dataclasses.replace(place, names=LoRA.factors)
