"""The learning rate as the log shows it."""

from __future__ import annotations

import jax
import numpy as np

from jaxpt.program import Program


class LearningRate:
    """The schedule's values, read without a device call at each step."""

    BLOCK = 512

    def __init__(self, program: Program):
        self._values = jax.jit(jax.vmap(program.learning_rate))
        self._start, self._block = -1, np.zeros(0)

    def __call__(self, phase_step: int) -> float:
        start = phase_step - phase_step % self.BLOCK
        if start != self._start:
            steps = np.arange(start, start + self.BLOCK, dtype=np.int32)
            self._start, self._block = start, np.asarray(self._values(steps))
        return float(self._block[phase_step - start])
