"""What follows from the guard's verdicts: lines for people, the end of a run, a way back.

A verdict is read one step late, like all metrics: when the next step has been dispatched. So it is
after a stop and a resume, too (the state knows the last verdict), and the two runs are the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxpt.checkpoint import Checkpoints
from jaxpt.errors import NonFiniteError
from jaxpt.folder import RunFolder
from jaxpt.guard import GOOD, NAME, NON_FINITE, TOLD, VERDICTS
from jaxpt.monitor import MonitorSession
from jaxpt.program import Program
from jaxpt.progress import Progress
from jaxpt.state import TrainState
from jaxpt.steps import Metrics
from jaxpt.writers import MetricsFile

KEPT = 2  # checkpoints to go back to: the last may have been saved at the spike itself


@dataclasses.dataclass(frozen=True)
class Step:
    """A step whose verdict has not been read: its number in the run and in the phase."""

    step: int
    phase_step: int
    told: Mapping[str, Any]


class Watch:
    """Looks at every step of a phase; see ``__call__``.

    Updates that were left out stand in guard.jsonl, a line each: "step"; "verdict"; the batch, as
    "phase" and its number there, "batch" (``jaxpt data show`` makes it again); "loss" and
    "grad_norm"; and "rolled_back_to", the checkpoint that the run went back to.

    Args:
      first: whether this process writes.
    """

    def __init__(
        self,
        program: Program,
        state: TrainState,
        progress: Progress,
        folder: RunFolder,
        checkpoints: Checkpoints,
        monitor: MonitorSession,
        first: bool,
    ):
        self.program, self.progress, self.folder = program, progress, folder
        self.checkpoints, self.monitor, self.first = checkpoints, monitor, first
        self.guard = program.run.guard
        self._before: Step | None = None
        if NAME in state.extra:
            told = {name: np.asarray(state.extra[NAME][name]) for name in TOLD}
            self._before = Step(progress.step, progress.phase_step, told)
        if first and folder.guard.is_file():
            MetricsFile(folder.guard, progress.step).close()  # later steps come again

    def __call__(self, state: TrainState, metrics: Metrics) -> TrainState:
        """A step has been dispatched: acts upon the one before.

        Args:
          metrics: of the step; what is told of the guard is taken out of them.

        Returns:
          ``state``, or the one to go on with.

        Raises:
          NonFiniteError: too many updates in a row were not finite.
        """
        if f"guard/{TOLD[0]}" not in metrics:
            return state
        told = {name: metrics.pop(f"guard/{name}") for name in TOLD}
        for value in told.values():
            value.copy_to_host_async()
        before, self._before = (
            self._before,
            Step(self.progress.step, self.progress.phase_step, told),
        )
        if before is None or int(before.told["verdict"]) == GOOD:
            return state
        back = self._way_back(before)
        self._tell(before, back)
        return state if back is None else self._roll_back(state, back)

    def end(self) -> None:
        """The phase has ended: tells of its last step. Raises NonFiniteError."""
        if self._before is not None and int(self._before.told["verdict"]) != GOOD:
            self._tell(self._before, None)
        self._before = None

    def _tell(self, step: Step, back: int | None) -> None:
        verdict, row = int(step.told["verdict"]), int(step.told["in_a_row"])
        loss, norm = float(step.told["loss"]), float(step.told["norm"])
        phase = self.program.phase.name
        seen = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        self.monitor.note(
            f"step {step.step}: {VERDICTS[verdict]}, {seen}: its update is left out; the batch: "
            f"jaxpt data show {self.folder.path} --phase {phase} --at-batch {step.phase_step}"
        )
        if back is not None:
            self.monitor.note(
                f"step {self.progress.step}: rolled back to the parameters of checkpoint {back}"
            )
        if self.first:
            line = {
                "verdict": VERDICTS[verdict],
                "phase": phase,
                "batch": step.phase_step,
                "loss": loss,
                "grad_norm": norm,
                "rolled_back_to": back,
            }
            file = MetricsFile(self.folder.guard, step.step)
            file.write(step.step, line)
            file.close()
        if verdict == NON_FINITE and row > self.guard.in_a_row:
            what = "loss" if not math.isfinite(loss) else "gradient"
            self.checkpoints.wait()
            last = max(self.checkpoints.steps(), default=None)
            raise NonFiniteError(
                f"the {what} is not finite at {row} steps in a row, up to step {step.step}; all "
                "their updates were left out; look at the batches that guard.jsonl names, or lower "
                "the learning rate; the last good checkpoint is "
                f"{'none' if last is None else self.folder.checkpoints / str(last)}"
            )

    def _way_back(self, step: Step) -> int | None:
        """The checkpoint to go back to, if that is asked for: the last one before the spike."""
        if self.guard.spikes != "roll_back" or int(step.told["verdict"]) == NON_FINITE:
            return None
        return max((saved for saved in self.progress.saves if saved < step.step), default=None)

    def _roll_back(self, state: TrainState, step: int) -> TrainState:
        """The state at a checkpoint, as if all updates since had been left out: what the guard
        knows, the data and the count of steps go on."""
        own = state.extra.pop(NAME)
        for array in jax.tree.leaves(state):
            array.delete()  # there may be no room for both
        self.checkpoints.wait()
        old = self.checkpoints.restore(step, self.program.abstract)
        self.progress.saves = [saved for saved in self.progress.saves if saved <= step]
        return dataclasses.replace(old, extra=old.extra | {NAME: own})


def due(progress: Progress, checkpoints: Checkpoints, guard: Any) -> None:
    """A checkpoint that is due is about to be saved at the present step: it is one to go back to,
    and is held as long as it is."""
    if guard.spikes == "roll_back":
        progress.saves = [*progress.saves, progress.step][-KEPT:]
        checkpoints.held = set(progress.saves)
