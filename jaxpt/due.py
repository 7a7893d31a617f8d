"""When what happens every so often is due."""

from __future__ import annotations

import time

from jaxpt.duration import Duration, as_duration
from jaxpt.program import Program


class Due:
    """Whether what happens every so often is due after a step of the phase."""

    def __init__(self, every: int | float | Duration | None, program: Program):
        self.steps = None if every is None else program.in_steps(every)
        duration = None if every is None else as_duration(every)
        self.seconds = duration.value if duration and duration.unit == "seconds" else None
        self.last = time.monotonic()

    def by_step(self, phase_step: int) -> bool:
        return bool(self.steps) and phase_step % self.steps == 0

    def by_clock(self) -> bool:
        """This process's clock, that is: the others' may say otherwise."""
        due = bool(self.seconds) and time.monotonic() - self.last >= self.seconds
        if due:
            self.last = time.monotonic()
        return due
