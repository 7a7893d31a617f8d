"""What a run is examined by on its way and at its end: validation losses, tasks, samples."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

from jaxpt import examine
from jaxpt.data.tokenizers import Tokenizer
from jaxpt.distributed import Session
from jaxpt.evaluation import Validation, logged, mean_loss
from jaxpt.folder import RunFolder
from jaxpt.loading import Loaded
from jaxpt.monitor import MonitorSession
from jaxpt.program import Program
from jaxpt.progress import Progress
from jaxpt.report import write_results, write_samples
from jaxpt.samples import samples
from jaxpt.signals import Interrupted, StopRequest
from jaxpt.state import TrainState


class Checkups:
    """Each is done once at a step, and left where a stop is asked for.

    results: component -> its figures, of the last evaluation; None: there was none so far.
    """

    def __init__(
        self,
        folder: RunFolder,
        tokenizer: Tokenizer,
        monitor: MonitorSession,
        stop: StopRequest,
        together: Session,
        program: Callable[[int], Program],
    ):
        self.folder, self.tokenizer, self.monitor = folder, tokenizer, monitor
        self.stop, self.together, self.program = stop, together, program
        self.results: examine.Results | None = None
        self._evaluated_at = self._asked_at = -1

    def settle(self, progress: Progress, program: Program, state: TrainState) -> bool:
        """Does what is owed at the present step. Returns False where a stop came before its end:
        the run owes it still, and does it when it goes on."""
        todo = {"evaluate": self.evaluate, "ask": self.ask}
        try:
            while progress.owed:
                todo[progress.owed[0]](progress.step, program, state)
                del progress.owed[0]
        except Interrupted:
            return False
        return True

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Around work that a stop may end at any point; several processes look ``_between``."""
        return self.stop.interrupting() if self.together.alone else contextlib.nullcontext()

    def _between(self) -> None:
        """Between the batches of an evaluation, which all processes leave at the same one."""
        if self.together.agree_to_stop(bool(self.stop)):
            raise Interrupted

    def evaluate(self, step: int, program: Program, state: TrainState) -> None:
        """Measures the validation losses. Raises Interrupted."""
        if self._evaluated_at == step:
            return
        with self.monitor.during("evaluating"), self.interruptible():
            validations = self.validations(program.index)
            loaded = self._loaded(step, program, state)
            self.results = examine.losses(loaded, validations, between=self._between)
        self.monitor.evaluation(step, logged(self.results))
        self._evaluated_at = step
        if self.together.first:
            write_results(self.folder.path, step, self.results)

    def ask(self, step: int, program: Program, state: TrainState) -> None:
        """Asks the tasks of the run's harness. Raises Interrupted."""
        harness = program.run.evaluate.harness
        if harness is None or self._asked_at == step:
            return
        with self.monitor.during("evaluating"), self.interruptible():
            found = examine.ask(self._loaded(step, program, state), harness)
        self.monitor.evaluation(step, logged(found))
        self._asked_at = step

    def samples(self, step: int, program: Program, state: TrainState) -> list[dict[str, str]]:
        """Validation examples, and what the model puts in their places. Raises Interrupted."""
        with self.monitor.during("sampling"), self.interruptible():
            found = samples(
                program,
                program.eval_params(state),
                self.tokenizer,
                self.validations(program.index),
                program.run.evaluate.samples,
            )
        if self.together.first:
            write_samples(self.folder.path, step, found)
        return found

    def loss(self, step: int) -> float | None:
        """The mean validation loss at a step; None where it was not measured there."""
        fresh = self.results is not None and self._evaluated_at == step
        return mean_loss(self.results or {}) if fresh else None

    def _loaded(self, step: int, program: Program, state: TrainState) -> Loaded:
        """The model as it is evaluated."""
        params = program.eval_params(state)
        return Loaded(self.folder.path, program, params, self.tokenizer, step)

    @functools.lru_cache(maxsize=1)  # noqa: B019 (these live as long as their process)
    def validations(self, index: int) -> list[Validation]:
        program = self.program(index)
        return program.validations(self.tokenizer, program.run.evaluate.batches)
