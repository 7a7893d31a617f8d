"""When masks change: every so many steps between a start and a stop, and by how much."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.duration import Duration, as_duration, share
from jaxpt.errors import ConfigError
from jaxpt.sparsity.base import Sparsify


@dataclasses.dataclass(frozen=True)
class Periodic(Sparsify):
    """A method that is due before steps start + every, start + 2 every, ... up to stop."""

    every: int | float | Duration = 100  # steps between two updates of the masks
    start: int | float | Duration = 0  # where in the phase they begin; the first is ``every`` later
    stop: int | float | Duration = share(0.75)  # where in the phase they end

    def in_phase(self, phase):
        steps = {name: phase.in_steps(getattr(self, name)) for name in ("every", "start", "stop")}
        return dataclasses.replace(self, **steps)

    def validate(self, phase):
        super().validate(phase)
        timed: Any = {}
        for name in ("every", "start", "stop"):
            timed[name] = phase.in_steps(getattr(self, name))
            if timed[name] is None:
                raise ConfigError(
                    name,
                    f"{getattr(self, name)} is not known beforehand in a phase of "
                    f"{phase.duration}; give steps",
                )
        if timed["every"] < 1:
            raise ConfigError("every", f"{self.every} is not valid; give 1 step or more")
        if timed["start"] >= timed["stop"]:
            raise ConfigError(
                "stop", f"{timed['stop']} steps is not after the start, {timed['start']}"
            )

    @property
    def updates(self) -> int:
        """How many there are."""
        return (self._steps("stop") - self._steps("start")) // self._steps("every")

    def due(self, step):
        since = step - self._steps("start")
        every = self._steps("every")
        return (since > 0) & (since % every == 0) & (since <= self.updates * every)

    def number(self, step: jax.Array) -> jax.Array:
        """Of the update at a step at which one is due: 1 to ``updates``."""
        return (step - self._steps("start")) // self._steps("every")

    def _steps(self, name: str) -> int:
        duration = as_duration(getattr(self, name))
        assert duration.unit == "steps", "durations are in steps once a phase is known"
        return int(duration.value)


def cubic(first: float, last: float, updates: int) -> list[float]:
    """Densities after update 0 (none yet) to ``updates``: last + (first - last) (1 - i / n)^3
    (Zhu and Gupta 2017, "To prune, or not to prune", equation 1)."""
    return [last + (first - last) * (1 - i / max(updates, 1)) ** 3 for i in range(updates + 1)]


def cosine(first: float, updates: int) -> jax.Array:
    """The share that is exchanged at update 0 to ``updates``: first / 2 (1 + cos(pi i / n))
    (Evci et al. 2020, "Rigging the Lottery", section 3, "Update schedule"), float32."""
    i = np.arange(updates + 1) / max(updates, 1)
    return jnp.asarray(first / 2 * (1 + np.cos(np.pi * i)), jnp.float32)
