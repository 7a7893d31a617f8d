"""The guard of a run: which updates are left out, because their loss or gradient is no finite
number, or stands far above those of the steps before.

It is decided inside the compiled step, of the loss and the gradient's norm of the global batch: so
all processes decide alike. Of an update that is left out nothing stays, as if its batch were not in
the data: parameters, optimizer state, masks, averages and the counts of updates are as they were,
and the next batch is tried in its place. Steps, as the log and the checkpoints count them, go on;
the learning rate's schedule, which goes by updates made, waits.

What the guard knows is in ``TrainState.extra`` (``NAME``), and so in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError

NAME = "guard"
GOOD, NON_FINITE, SPIKE = range(3)  # verdicts
TOLD = ("verdict", "in_a_row", "loss", "norm")  # of what it knows, to whoever acts upon a step
VERDICTS = ("good", "non-finite", "spike")
SIGMA = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
LEAST = 1e-3  # of the median: deviations below it count as that, where all values are alike
Action = Literal["skip", "roll_back"]
Own = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Guard:
    """What is done about losses and gradients that cannot be right.

    A spike is a value x of the loss or of the gradient's norm whose robust score

        (x - median) / (1.4826 median(|x_i - median|))

    over the last ``window`` good steps x_i of the phase lies above a limit. Until there are so
    many, there are no spikes. (Iglewicz and Hoaglin 1993, "How to detect and handle outliers",
    with the deviation as a standard one.)
    """

    non_finite: bool = True  # leave updates out whose loss or gradient is not a finite number
    in_a_row: int = 10  # more of these, one after the other, stop the run
    # what to do about a spike: skip leaves its update out, roll_back also goes back to the
    # parameters of the checkpoint before it, but not in the data; None: nothing
    spikes: Action | None = None
    loss_score: float | None = 10.0  # score of the loss above which it is a spike; None: of none
    gradient_score: float | None = 10.0  # the same of the gradient's norm
    window: int = 100  # good steps that a spike is held against
    most: int = 10  # spikes of a run about which something is done

    def __post_init__(self):
        for name in ("in_a_row", "most"):
            if getattr(self, name) < 0:
                raise ConfigError(name, f"{getattr(self, name)} is not valid; give 0 or more")
        if self.window < 4:
            raise ConfigError("window", f"{self.window} is not valid; give 4 steps or more")
        if self.spikes is not None and self.spikes not in get_args(Action):
            raise ConfigError("spikes", f"{self.spikes!r} is not one of skip, roll_back, None")
        for name, limit in self.limits.items():
            if not limit > 0:
                raise ConfigError(name, f"{limit} is not valid; give a number > 0, or None")
        if self.spikes is not None and not self.limits:
            raise ConfigError("spikes", "needs loss_score or gradient_score; both are None")

    @property
    def limits(self) -> dict[str, float]:
        """Those of the scores that are given, by their fields."""
        given = {name: getattr(self, name) for name in ("loss_score", "gradient_score")}
        return {name: limit for name, limit in given.items() if limit is not None}

    @property
    def on(self) -> bool:
        """Whether there is anything to judge."""
        return self.non_finite or self.spikes is not None

    def init(self) -> dict[str, Own]:
        """What ``TrainState.extra`` has of it: {} where it is not on.

        int32 scalars: "verdict" of the last step; "in_a_row", steps so far that were not finite;
        "skipped", updates left out in the run. Float32 scalars: "loss" and "norm" of the last step.
        For spikes: "spikes", those acted upon; "seen",
        good steps of the phase; and a window [W] of float32 of each value that is looked at, in
        which the step's place is seen mod W.
        """
        if not self.on:
            return {}
        names = ["verdict", "in_a_row", "skipped"]
        own = {name: jnp.float32(0) for name in ("loss", "norm")}
        if self.spikes is not None:
            names += ["spikes", "seen"]
            own |= {name: jnp.zeros(self.window, jnp.float32) for name in self.limits}
        return {NAME: {name: jnp.int32(0) for name in names} | own}

    def next_phase(self, own: Own) -> Own:
        """Its state in the phase after: counts go on, the window is empty."""
        fresh = {name: jnp.zeros_like(own[name]) for name in ("verdict", "seen") if name in own}
        return own | fresh

    def spike(self, own: Own, name: str, value: jax.Array) -> jax.Array:
        """Whether a value is one: a bool scalar.

        Args:
          name: loss_score or gradient_score.
        """
        if self.spikes is None or name not in self.limits:
            return jnp.bool_(False)
        seen, window = own["seen"], own[name]
        median = jnp.median(window)
        deviation = SIGMA * jnp.median(jnp.abs(window - median))
        deviation = jnp.maximum(deviation, LEAST * jnp.abs(median))
        high = value - median > self.limits[name] * deviation
        return high & (seen >= self.window) & (own["spikes"] < self.most)

    def judge(self, own: Own, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, Own]:
        """Of a step's mean loss and its gradient's norm.

        Returns:
          (whether the update is made, a bool scalar; what it knows now).
        """
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        bad = ~finite if self.non_finite else jnp.bool_(False)
        values = {"loss_score": loss, "gradient_score": norm}
        spike = functools.reduce(jnp.logical_or, (self.spike(own, n, x) for n, x in values.items()))
        spike = spike & finite
        verdict = jnp.where(bad, NON_FINITE, jnp.where(spike, SPIKE, GOOD)).astype(jnp.int32)
        good = verdict == GOOD
        new = own | {
            "verdict": verdict,
            "in_a_row": jnp.where(bad, own["in_a_row"] + 1, 0),
            "skipped": own["skipped"] + ~good,
            "loss": loss.astype(jnp.float32),
            "norm": norm.astype(jnp.float32),
        }
        if self.spikes is not None:
            enters = good & finite
            at = own["seen"] % self.window
            for name in self.limits:
                value = jnp.where(enters, values[name].astype(jnp.float32), own[name][at])
                new[name] = own[name].at[at].set(value)
            new |= {"spikes": own["spikes"] + spike, "seen": own["seen"] + enters}
        return good, new


def only_if(good: jax.Array | None, update: Callable, leave_out: Callable, *operands: Any) -> Any:
    """``update`` of the operands where it is to be made, else ``leave_out`` of them; without a
    guard (``good`` is None) ``update``.

    A branch, and no select: where the old state is read until the new one is chosen, the step needs
    memory for both (on CPUs a twentieth more in all for ``configs/ul2_tiny.py``).
    """
    if good is None:
        return update(*operands)
    return jax.lax.cond(good, update, leave_out, *operands)


def kept(good: jax.Array | None, new: Any, old: Any) -> Any:
    """``new`` where the update is made, or there is no guard; else ``old``. For what is small."""
    if good is None:
        return new
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
