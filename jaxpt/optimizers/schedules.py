"""Learning rate schedules: multipliers in [0, 1] of the learning rate over a phase's steps.

Step s is the number of updates made before, from 0. A warmup of w steps rises in a straight line,
(s + 1) / (w + 1), so that no step is wasted at 0 and step w is the first at 1. What decays reaches
``final`` at s = total steps, just after the last update; it stays there if training goes on.

Lengths are a number of steps, a number below 1 for a share of the phase, or a ``Duration``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxpt.duration import Duration
from jaxpt.errors import ConfigError

Length = int | float | Duration
InSteps = Callable[[Duration], int | None]  # a duration in steps of the phase, None if not known
StepFunction = Callable[[jax.Array], jax.Array]  # step of the phase (int32) -> float32 scalar


def length(value: Length) -> Duration:
    """A number below 1 is a share of the phase, any other a number of steps."""
    if isinstance(value, Duration):
        return value
    return Duration(value, "share" if 0 < value < 1 else "steps")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Config of a schedule; subclasses say when it is at which share of the learning rate."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("warmup", "decay"):
                _checked_length(field.name, value)
            if field.name == "final" and not 0 <= value <= 1:
                raise ConfigError("final", f"{value} is not valid; give a share between 0 and 1")

    def multiplier(self, total: int | None, in_steps: InSteps) -> optax.Schedule:
        """The schedule over ``total`` steps (None if not known), as optax has them."""
        raise NotImplementedError

    def build(self, total_steps: int | None, in_steps: InSteps) -> StepFunction:
        """Step of the phase (int32) -> multiplier, float32; can be traced.

        Args:
          total_steps: steps of the phase; None where they are not known beforehand.
          in_steps: a duration in steps of the phase, None where it cannot be known.

        Raises:
          ConfigError: the schedule needs a length which is not known, or is longer than the phase.
        """
        schedule = self.multiplier(total_steps, in_steps)
        return lambda step: jnp.asarray(schedule(jnp.asarray(step)), jnp.float32)

    def _steps(self, field: str, total: int | None, in_steps: InSteps) -> int:
        """The field in steps, not longer than the phase."""
        value = getattr(self, field)
        count = in_steps(length(value))
        if count is None:
            raise ConfigError(
                field,
                f"{value} cannot be told in steps of this phase beforehand; give it in steps or "
                "tokens, or give the phase's length so",
            )
        if total is not None and count > total:
            raise ConfigError(field, f"{count} steps do not fit into a phase of {total}")
        return count

    def _total(self, total: int | None) -> int:
        if total is None:
            raise ConfigError(
                "",
                f"{type(self).__name__} needs the phase's length in steps beforehand; give the "
                "phase in steps, tokens or examples, or use Constant or ReciprocalSqrt",
            )
        return total


def _checked_length(field: str, value: Length) -> None:
    try:
        fine = isinstance(length(value), Duration)
    except ConfigError as error:
        raise error.within(field) from None
    if not fine or (not isinstance(value, Duration) and value > 1 and value != int(value)):
        raise ConfigError(field, f"{value} is no whole number of steps and no share below 1")


def rise(steps: int) -> list[tuple[optax.Schedule, int]]:
    """The warmup as a piece for ``join``: none where it has no steps."""
    return [(optax.linear_schedule(1 / (steps + 1), 1.0, steps), steps)] if steps else []


def fall(steps: int, shape: Callable[[jax.Array], jax.Array], final: float) -> optax.Schedule:
    """From 1 to ``final`` over so many steps; ``shape`` maps progress in [0, 1] to 1 ... 0."""

    def schedule(step):
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0.0, 1.0)
        return final + (1 - final) * shape(progress)

    return schedule


def join(pieces: list[tuple[optax.Schedule, int]], last: optax.Schedule) -> optax.Schedule:
    """(schedule, steps) pieces one after the other, then ``last``."""
    boundaries, at = [], 0
    for _, steps in pieces:
        at += steps
        boundaries.append(at)
    return optax.join_schedules([*(piece for piece, _ in pieces), last], boundaries)


def straight(progress: jax.Array) -> jax.Array:
    return 1 - progress


def half_cosine(progress: jax.Array) -> jax.Array:
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def one_minus_sqrt(progress: jax.Array) -> jax.Array:
    return 1 - jnp.sqrt(progress)


SHAPES = {"linear": straight, "cosine": half_cosine, "sqrt": one_minus_sqrt}


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """1 after the warmup."""

    warmup: Length = 0  # steps (or share below 1, or duration) of the linear rise to 1

    def multiplier(self, total, in_steps):
        pieces = rise(self._steps("warmup", total, in_steps))
        return join(pieces, optax.constant_schedule(1.0))


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from 1 at the end of the warmup to ``final`` at the end of the phase."""

    warmup: Length = 0  # steps (or share below 1, or duration) of the linear rise to 1
    final: float = 0.0  # share of the learning rate at the phase's end

    def multiplier(self, total, in_steps):
        total = self._total(total)
        warmup = self._steps("warmup", total, in_steps)
        return join(rise(warmup), fall(total - warmup, straight, self.final))


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 to ``final`` (Loshchilov and Hutter 2017, eq. 5, without restarts)."""

    warmup: Length = 0  # steps (or share below 1, or duration) of the linear rise to 1
    final: float = 0.1  # share of the learning rate at the phase's end

    def multiplier(self, total, in_steps):
        total = self._total(total)
        warmup = self._steps("warmup", total, in_steps)
        return join(rise(warmup), fall(total - warmup, half_cosine, self.final))


@dataclasses.dataclass(frozen=True)
class ReciprocalSqrt(Schedule):
    """sqrt(warmup / max(step, warmup)): constant for ``warmup`` steps, then falling (T5: Raffel et
    al. 2020, section 3.1.2, where the rate is 1 / sqrt(max(step, 10^4)), so lr is 0.01 there).

    With ``ramp`` the first steps rise in a straight line instead (Vaswani et al. 2017, eq. 3).
    With ``decay`` the last steps fall to 0 in a straight line besides (Zhai et al. 2022).
    """

    warmup: Length = 10_000  # steps (or share below 1, or duration) before the fall begins
    ramp: bool = False  # rise linearly during the warmup instead of staying at 1
    decay: Length = 0  # steps (or share below 1, or duration) of the linear fall to 0 at the end

    def multiplier(self, total, in_steps):
        # T5's 10^4 steps are fine in a shorter phase, which then has a constant rate.
        warmup = self._steps("warmup", total if self.ramp else None, in_steps)
        decay = self._steps("decay", total, in_steps)
        end = self._total(total) if decay else 0
        lower = max(warmup, 1)

        def schedule(step):
            step_float = jnp.asarray(step, jnp.float32)
            value = jnp.sqrt(lower / jnp.maximum(step_float, lower))
            if self.ramp:
                value = jnp.minimum(value, (step_float + 1) / (warmup + 1))
            if decay:
                value = value * jnp.clip((end - step_float) / decay, 0.0, 1.0)
            return value

        return schedule


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Rise, 1, and a fall over the last steps (Hu et al. 2024; ``sqrt`` is the 1 - sqrt of
    Hägele et al. 2024)."""

    warmup: Length = 0  # steps (or share below 1, or duration) of the linear rise to 1
    decay: Length = 0.1  # steps (or share below 1, or duration) of the fall at the end
    final: float = 0.0  # share of the learning rate at the phase's end
    shape: Literal["linear", "cosine", "sqrt"] = "linear"  # of the fall

    def __post_init__(self):
        super().__post_init__()
        if self.shape not in SHAPES:
            raise ConfigError("shape", f"{self.shape!r} is not one of {', '.join(SHAPES)}")

    def multiplier(self, total, in_steps):
        total = self._total(total)
        warmup = self._steps("warmup", total, in_steps)
        decay = self._steps("decay", total, in_steps)
        stable = total - warmup - decay
        if stable < 0:
            raise ConfigError(
                "decay", f"{warmup} steps of warmup and {decay} of decay exceed the phase's {total}"
            )
        pieces = [*rise(warmup), (optax.constant_schedule(1.0), stable)]
        return join(pieces, fall(decay, SHAPES[self.shape], self.final))


@dataclasses.dataclass(frozen=True)
class Restarts(Schedule):
    """``schedule``, but that the learning rate rises anew from 0 every ``every`` steps of the phase
    (Lialin et al. 2023, "ReLoRA", section 3: the jagged cosine).

    The first ``every`` steps are as ``schedule`` has them, its warmup included.
    """

    schedule: Schedule = Cosine()  # the learning rate but for the rises
    every: int = 1000  # steps between two restarts; those of ``growth.ReLoRA``
    warmup: Length = 50  # steps (or share below 1, or duration) of each linear rise

    def __post_init__(self):
        super().__post_init__()
        if self.every < 1:
            raise ConfigError("every", f"{self.every} is not valid; give 1 or more")

    def multiplier(self, total, in_steps):
        try:
            plain = self.schedule.multiplier(total, in_steps)
        except ConfigError as error:
            raise error.within("schedule") from None
        warmup = self._steps("warmup", None, in_steps)
        if warmup >= self.every:
            raise ConfigError(
                "warmup", f"{warmup} steps do not fit between restarts every {self.every}"
            )

        def schedule(step):
            since = (step % self.every + 1) / (warmup + 1)
            return plain(step) * jnp.where(step >= self.every, jnp.minimum(since, 1.0), 1.0)

        return schedule
