"""The loop: the one place with side effects. It reads batches, calls the step, writes metrics,
saves and evaluates; what is computed is decided by the run alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import rich.console

from jaxpt import examine, summary
from jaxpt.checkpoint import Checkpoints
from jaxpt.data.cache import cache_folder
from jaxpt.data.device import DeviceBatches, gathered
from jaxpt.data.tokenizers import Tokenizer
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.distributed import Session, Wishes, session, start
from jaxpt.due import Due
from jaxpt.errors import Exit
from jaxpt.evaluation import logged, mean_loss
from jaxpt.files import read_json
from jaxpt.folder import RunFolder
from jaxpt.loading import Loaded
from jaxpt.mesh import Layout
from jaxpt.monitor import MonitorSession
from jaxpt.program import Program
from jaxpt.rate import LearningRate
from jaxpt.report import write_report, write_results, write_samples
from jaxpt.run import Phase, Run, to_json
from jaxpt.samples import samples, show
from jaxpt.signals import StopRequest
from jaxpt.start import Start, open_start
from jaxpt.state import TrainState


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved with every checkpoint, as JSON.

    step counts over all phases, phase_step within one; schedule_start is the optimizer's update
    count at which the phase's schedule began; data and monitor are the states of the loader and
    of the log.
    """

    phase: int = 0
    step: int = 0
    phase_step: int = 0
    phase_seconds: float = 0.0
    schedule_start: int = 0
    data: dict[str, Any] | None = None
    monitor: dict[str, Any] | None = None


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


class Trainer:
    """A run under way in its folder."""

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        tokenizer: Tokenizer,
        layout: Layout,
        checkpoints: Checkpoints,
        monitor: MonitorSession,
        stop: StopRequest,
        together: Session,
        progress: Progress,
        resumed: tuple[Program, TrainState] | None,
        source: Start | None = None,
    ):
        self.run, self.folder, self.tokenizer, self.layout = run, folder, tokenizer, layout
        self.checkpoints, self.monitor = checkpoints, monitor
        self.stop, self.progress = stop, progress
        self.together, self.resumed, self.source = together, resumed, source
        self.key = jax.random.key(run.seed)
        self.results: dict[str, dict[str, float]] | None = None
        self._evaluated_at = self._asked_at = -1

    def train(self) -> Result:
        """Every phase that is left, from where the run stands."""
        program, state = self.resumed or self.begin()
        while True:
            state, stopped = self.run_phase(program, state)
            if stopped or self.progress.phase + 1 == len(self.run.phases):
                break
            program, state = self.next_phase(program, state)
        result = Result(self.folder.path, program, state, self.progress, self.results, None)
        if stopped:
            result.stopped = self.stop.signal.name if self.stop.signal else "SIGTERM"
            self.monitor.stop(result.stopped)
        else:
            self.finish(result)
        return result

    def finish(self, result: Result) -> None:
        """The last evaluation, and samples of what the model does."""
        program, state = result.program, result.state
        self.evaluate(program, state)
        self.ask(program, state)
        result.results = self.results
        with self.monitor.during("sampling"):
            result.samples = samples(
                program,
                program.eval_params(state),
                self.tokenizer,
                self.validations(program.index),
                self.run.evaluate.samples,
            )
        if self.together.first:
            write_samples(self.folder.path, self.progress.step, result.samples)

    def program(self, index: int, schedule_start: int = 0) -> Program:
        return Program(self.run, index, self.tokenizer.vocabulary, self.layout, schedule_start)

    def begin(self) -> tuple[Program, TrainState]:
        program = self.program(0)
        seed = self.run.seed if self.run.init_seed is None else self.run.init_seed
        key = jax.random.key(seed)
        state = self.source.state(program, key) if self.source else program.init(key)
        self.save(state)
        return program, state

    def next_phase(self, before: Program, state: TrainState) -> tuple[Program, TrainState]:
        """The next phase's program, and the state that it begins with."""
        progress = self.progress
        index, updates = progress.phase + 1, progress.schedule_start + progress.phase_step
        program = self.program(index, updates)
        if not program.keeps_optimizer(before):
            program = self.program(index)
        key = jax.random.fold_in(jax.random.key(self.run.seed), index)
        state = program.follow(before, state, key)
        self.progress = Progress(index, progress.step, schedule_start=program.schedule_start)
        return program, state

    def run_phase(self, program: Program, state: TrainState) -> tuple[TrainState, bool]:
        """Trains to the end of the phase, or until a stop is asked for; saves at either.

        Returns:
          (the state, whether a stop was asked for).
        """
        progress, phase, monitor = self.progress, program.phase, self.monitor
        asked = self.together.agree_now(self.wishes(phase))
        if asked.over or asked.stop or self.has_its_steps(phase):
            return state, asked.stop
        step = program.train_step
        monitor.begin(
            phase.name,
            tokens=phase.tokens_per_step,
            examples=phase.batch,
            flops=program.flops_per_step,
            seconds_left=phase.seconds and phase.seconds - progress.phase_seconds,
            phase_steps=phase.total_steps,
        )
        for line in summary.costs(program):
            monitor.note(line)
        evaluation_due = Due(self.run.evaluate.every, program)
        harness = self.run.evaluate.harness
        ask_due = Due(harness.every if harness else None, program)
        save_due = Due(self.run.checkpoint.every, program)
        rate = LearningRate(program)
        began = time.monotonic() - progress.phase_seconds
        with program.batches(self.tokenizer, progress.data) as batches:
            while not (asked.over or asked.stop):
                with monitor.wait():
                    batch = next(batches, None)
                if batch is None:  # the data has ended
                    break
                state, metrics = step(state, batch, self.key)
                batches.observe(metrics)
                progress.step += 1
                progress.phase_step += 1
                progress.phase_seconds = time.monotonic() - began
                known = {"learning_rate": rate(progress.phase_step - 1), **batches.metrics()}
                monitor.log(progress.step, metrics, known)
                asked = self.together.agree(self.wishes(phase, evaluation_due, save_due))
                asked.over |= self.has_its_steps(phase)
                if asked.evaluate or evaluation_due.by_step(progress.phase_step):
                    self.evaluate(program, state)
                if ask_due.by_step(progress.phase_step):
                    self.ask(program, state)
                if asked.save or save_due.by_step(progress.phase_step):
                    self.save(state, batches)
            asked = self.together.agree_now(self.wishes(phase))
        self.save(state, batches)
        return state, asked.stop

    def wishes(self, phase: Phase, evaluation: Due | None = None, save: Due | None = None):
        """What depends on this process's clock and on the signals that it gets."""
        return Wishes(
            stop=bool(self.stop),
            over=phase.seconds is not None and self.progress.phase_seconds >= phase.seconds,
            evaluate=evaluation is not None and evaluation.by_clock(),
            save=save is not None and save.by_clock(),
        )

    def has_its_steps(self, phase: Phase) -> bool:
        return phase.total_steps is not None and self.progress.phase_step >= phase.total_steps

    def loaded(self, program: Program, state: TrainState) -> Loaded:
        """The model as it is evaluated."""
        params = program.eval_params(state)
        return Loaded(self.folder.path, program, params, self.tokenizer, self.progress.step)

    def evaluate(self, program: Program, state: TrainState) -> None:
        """Measures the validation losses at the present step, once."""
        if self._evaluated_at == self.progress.step:
            return
        with self.monitor.during("evaluating"):
            loaded = self.loaded(program, state)
            self.results = examine.losses(loaded, self.validations(program.index))
        self.monitor.evaluation(self.progress.step, logged(self.results))
        self._evaluated_at = self.progress.step
        if self.together.first:
            write_results(self.folder.path, self.progress.step, self.results)

    def ask(self, program: Program, state: TrainState) -> None:
        """Asks the tasks of the run's harness at the present step, once."""
        harness = self.run.evaluate.harness
        if harness is None or self._asked_at == self.progress.step:
            return
        with self.monitor.during("evaluating"):
            found = examine.ask(self.loaded(program, state), harness)
        self.monitor.evaluation(self.progress.step, logged(found))
        self._asked_at = self.progress.step

    @functools.lru_cache(maxsize=1)  # noqa: B019 (a trainer lives as long as its process)
    def validations(self, index: int):
        return self.program(index).validations(self.tokenizer, self.run.evaluate.batches)

    def save(self, state: TrainState, batches: DeviceBatches | None = None) -> None:
        """Saves what is needed to go on: ``batches`` knows where the data stands."""
        with self.monitor.during("saving"):
            if batches is not None:
                self.progress.data = gathered(batches.state())
            self.progress.monitor = self.monitor.state()
            fresh = self.results is not None and self._evaluated_at == self.progress.step
            loss = mean_loss(self.results or {}) if fresh else None
            self.checkpoints.save(
                self.progress.step, state, dataclasses.asdict(self.progress), loss
            )


def train(run: Run, workdir: str | os.PathLike, *, restart: bool = False) -> Result:
    """Trains a run in its folder: a new one, or on from its last checkpoint.

    Args:
      run: everything that is computed follows from it.
      workdir: the run's folder; made if it is not there.
      restart: begin again from step 0 where the folder holds metrics but no checkpoint.

    Raises:
      ConfigError: an impossible choice, or a folder that holds something else; nothing has been
        written then.
      DataError: input that cannot be read, or a checkpoint that does not fit.
    """
    run.validate(jax.device_count())
    folder = RunFolder(Path(workdir))
    layout, tokenizer = run.mesh.build(), folder.tokenizer(run)
    source = open_start(run, folder)
    check(run, tokenizer, layout, source)
    with contextlib.ExitStack() as stack:
        together = stack.enter_context(session())
        if together.first:
            stack.enter_context(folder.lock())
            folder.claim(run, restart=restart)
            folder.keep_tokenizer(tokenizer)
            stack.callback(write_report, folder.path)  # last of all, whatever happened
        together.barrier("the folder is there")
        stop = stack.enter_context(StopRequest())
        opened = run.checkpoint.open(folder.checkpoints, to_json(run))
        checkpoints = stack.enter_context(opened)
        read = functools.partial(restore, run, tokenizer.vocabulary, layout, checkpoints)
        saved, damaged = checkpoints.newest(read)
        progress, resumed = saved or (Progress(), None)
        monitor = MonitorSession(
            run.monitor,
            folder.path,
            step=progress.step,
            total_steps=total_steps(run),
            state=progress.monitor,
            run_config=read_json(folder.config),
        )
        stack.enter_context(monitor)
        together.ending = monitor.abandon
        for step, cause in damaged.items():
            monitor.note(f"checkpoint {step} is damaged and was set aside: {cause}")
        if resumed:
            monitor.note(f"going on from step {progress.step} in {folder.path}")
        trainer = Trainer(
            run,
            folder,
            tokenizer,
            layout,
            checkpoints,
            monitor,
            stop,
            together,
            progress,
            resumed,
            source,
        )
        with together.watching():
            return trainer.train()


def restore(
    run: Run, vocabulary: Vocabulary, layout: Layout, checkpoints: Checkpoints, step: int
) -> tuple[Progress, tuple[Program, TrainState]]:
    """Where a run stood at a checkpoint, its phase there, and its state."""
    progress = Progress(**checkpoints.progress(step))
    program = Program(run, progress.phase, vocabulary, layout, progress.schedule_start)
    return progress, (program, checkpoints.restore(step, program.abstract))


def check(run: Run, tokenizer: Tokenizer, layout: Layout, source: Start | None = None) -> None:
    """Builds every phase as far as that needs no device. Raises ConfigError."""
    examine.check(run.evaluate.harness)
    before, start = None, source and source.model
    for index in range(len(run.phases)):
        program = Program(run, index, tokenizer.vocabulary, layout)
        program.check(before, start)
        before = program


def main(
    run: Run,
    *,
    workdir: str | os.PathLike,
    dry_run: bool = False,
    restart: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> int:
    """``jaxpt train``: trains, then shows losses beside baselines, samples, and the report's path.

    Args:
      coordinator, processes, process_id: see ``distributed.detect``.

    Returns:
      The exit code: that of the signal where one stopped the run.
    """
    if dry_run:
        summary.show(run)
        return Exit.OK
    use_compilation_cache()
    start(coordinator, processes, process_id)
    result = train(run, workdir, restart=restart)
    console = rich.console.Console(quiet=jax.process_index() > 0)
    if result.stopped is not None:
        console.print(
            f"stopped by {result.stopped} at step {result.progress.step}; everything is saved. "
            f"The same command goes on from there (--workdir {result.folder})."
        )
        return 128 + signal.Signals[result.stopped]
    if result.results:
        summary.show_results(result.results, console)
    show(result.samples, console)
    console.print(f"report: {result.folder / 'report.html'}", soft_wrap=True)
    return Exit.OK


def use_compilation_cache() -> None:
    """Keeps compiled programs in the cache folder, so that a run that goes on starts at once."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def total_steps(run: Run) -> int | None:
    """Steps of all phases, or None where that is not known beforehand."""
    steps = [phase.total_steps for phase in run.phases]
    return None if None in steps else sum(s for s in steps if s is not None)
