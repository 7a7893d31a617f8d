"""Where a run stands, and what it came to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxpt.program import Program
from jaxpt.state import TrainState


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved with every checkpoint, as JSON.

    step counts over all phases, phase_step within one; schedule_start is the optimizer's update
    count at which the phase's schedule began; data and monitor are the states of the loader and
    of the log; owed is what was due at this step ("evaluate", "ask") and a stop came before; saves
    are the steps of the last checkpoints of the phase that were due, to which the guard may go
    back; early says of phases that ended for want of data when and how.
    """

    phase: int = 0
    step: int = 0
    phase_step: int = 0
    phase_seconds: float = 0.0
    schedule_start: int = 0
    data: dict[str, Any] | None = None
    monitor: dict[str, Any] | None = None
    owed: list[str] = dataclasses.field(default_factory=list)
    saves: list[int] = dataclasses.field(default_factory=list)
    early: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Result:
    """What a run came to.

    results: component -> validation loss, baseline, accuracy, targets, at the last step.
    samples: validation examples, and what the model puts in the place of their targets.
    stopped: the signal that ended it before its time, or None.
    """

    folder: Path
    program: Program
    state: TrainState
    progress: Progress
    results: dict[str, dict[str, float]] | None
    stopped: str | None
    samples: list[dict[str, str]] = dataclasses.field(default_factory=list)
