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

import jax
import rich.console

from jaxpt import determinism, environment, examine, summary, watch
from jaxpt.checkpoint import Checkpoints
from jaxpt.checkups import Checkups
from jaxpt.data.cache import cache_folder
from jaxpt.data.device import DeviceBatches, gathered
from jaxpt.data.tokenizers import Tokenizer
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.distributed import Session, Wishes, session, start
from jaxpt.due import Due
from jaxpt.errors import Exit, LostProcessError
from jaxpt.files import read_json
from jaxpt.folder import RunFolder
from jaxpt.maintenance import notices
from jaxpt.mesh import Layout
from jaxpt.monitor import MonitorSession
from jaxpt.objectives.base import Batch
from jaxpt.program import Program
from jaxpt.progress import Progress, Result
from jaxpt.report import write_report
from jaxpt.restoring import restored
from jaxpt.run import Phase, Run, to_json
from jaxpt.samples import show
from jaxpt.shortage import explained
from jaxpt.signals import Interrupted, StopRequest
from jaxpt.start import Start, open_start
from jaxpt.state import TrainState
from jaxpt.watch import Watch


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
        self.checkups = Checkups(folder, tokenizer, monitor, stop, together, self.program)
        self._ending = False  # whether the loop has come to its end, or will at once
        stop.idle, stop.leaving = self.idle, self.abandon

    def train(self) -> Result:
        """Every phase that is left, from where the run stands."""
        program, state = self.resumed or self.begin()
        while True:
            with explained(program):
                state, stopped = self.run_phase(program, state)
            if stopped or self.progress.phase + 1 == len(self.run.phases):
                break
            program, state = self.next_phase(program, state)
        result = Result(self.folder.path, program, state, self.progress, None, None)
        try:
            if not stopped:
                at, checkups = (self.progress.step, program, state), self.checkups
                checkups.evaluate(*at)
                checkups.ask(*at)
                result.results, result.samples = checkups.results, checkups.samples(*at)
        except Interrupted:
            stopped = True
        if stopped:
            result.stopped = self.stop.signal.name if self.stop.signal else "SIGTERM"
            self.monitor.stop(self.stop.cause or result.stopped)
        self.monitor.note_end(self.progress.early)
        self._ending = True
        return result

    def program(self, index: int, schedule_start: int = 0) -> Program:
        return Program(self.run, index, self.tokenizer.vocabulary, self.layout, schedule_start)

    def begin(self) -> tuple[Program, TrainState]:
        program = self.program(0)
        seed = self.run.seed if self.run.init_seed is None else self.run.init_seed
        key = jax.random.key(seed)
        state = self.source.state(program, key) if self.source else program.init(key)
        self.save(state, due=True)
        return program, state

    def next_phase(self, before: Program, state: TrainState) -> tuple[Program, TrainState]:
        """The next phase's program, and the state that it begins with."""
        progress = self.progress
        index, updates = progress.phase + 1, int(state.opt_state.count)
        program = self.program(index, updates)
        if not program.keeps_optimizer(before):
            program = self.program(index)
        key = jax.random.fold_in(jax.random.key(self.run.seed), index)
        state = program.follow(before, state, key)
        start, early = program.schedule_start, progress.early
        self.progress = Progress(index, progress.step, schedule_start=start, early=early)
        return program, state

    def run_phase(self, program: Program, state: TrainState) -> tuple[TrainState, bool]:
        """Trains to the end of the phase, or until a stop is asked for; saves at either.

        Returns:
          (the state, whether a stop was asked for).
        """
        progress, phase, monitor = self.progress, program.phase, self.monitor
        asked = self.together.agree_now(self.wishes(phase))
        asked.stop = asked.stop or not self.checkups.settle(progress, program, state)
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
        watch = self.watch(program, state)
        began = time.monotonic() - progress.phase_seconds
        with program.batches(self.tokenizer, progress.data) as batches:
            while not (asked.over or asked.stop):
                batch = self.next_batch(batches)
                if batch is None:  # the data has ended, or a stop is asked for
                    break
                state, metrics = step(state, batch, self.key)
                batches.observe(metrics)
                progress.step += 1
                progress.phase_step += 1
                progress.phase_seconds = time.monotonic() - began
                state = watch(state, metrics)
                monitor.log(progress.step, metrics, batches.metrics())
                asked = self.together.agree(self.wishes(phase, evaluation_due, save_due))
                asked.over |= self.has_its_steps(phase)
                evaluate = asked.evaluate or evaluation_due.by_step(progress.phase_step)
                ask = ask_due.by_step(progress.phase_step)
                progress.owed = ["evaluate"] * evaluate + ["ask"] * ask
                asked.stop = not self.checkups.settle(progress, program, state) or asked.stop
                if asked.save or save_due.by_step(progress.phase_step):
                    self.save(state, batches, due=True)
            asked = self.together.agree_now(self.wishes(phase))
            self._ending = asked.stop
            if not asked.stop:
                watch.end()
                self.look_for_more(phase, over=asked.over)
            self.save(state, batches)
        return state, asked.stop

    def watch(self, program: Program, state: TrainState) -> Watch:
        """Over the steps of a phase."""
        at, first = (self.folder, self.checkpoints, self.monitor), self.together.first
        return Watch(program, state, self.progress, *at, first)

    def look_for_more(self, phase: Phase, *, over: bool) -> None:
        """Where a phase has ended before its length, its data has: says so."""
        if over or self.has_its_steps(phase) or phase.epochs is not None:
            return
        line = f"the data of phase {phase.name} ended after {self.progress.phase_step} steps"
        line += f" of {phase.total_steps}" if phase.total_steps else f", before {phase.duration}"
        if line not in self.progress.early:
            self.progress.early = [*self.progress.early, line]
        self.monitor.note(line)

    def next_batch(self, batches: DeviceBatches) -> Batch | None:
        """None where the data has ended, or a stop was asked for while it was waited for."""
        try:
            with self.monitor.wait():
                with self.checkups.interruptible():
                    batches.fill()
                return next(batches, None)
        except (Interrupted, LostProcessError):  # of a worker that had the signal, too
            if not (self.stop and self.together.alone):
                raise
            return None

    def idle(self) -> bool:
        """Whether the loop is busy, and nothing would be lost if the process ended now."""
        saved = self.folder.last_step() or 0
        return self.together.alone and not self._ending and saved == self.progress.step

    def abandon(self, why: str) -> str:
        """The process is about to be ended on request: says so, and what is left."""
        saved = self.folder.last_step()
        line = f"{why}; the run goes on from its {f'checkpoint {saved}' if saved else 'beginning'}"
        self.monitor.abandon(f"{self.stop.cause}: {line}", "stopped")
        if self.together.first and not self.together.alone:
            time.sleep(1)  # the others' runtime would end with that of process 0
        return line

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

    def save(
        self, state: TrainState, batches: DeviceBatches | None = None, *, due: bool = False
    ) -> None:
        """Saves what is needed to go on: ``batches`` knows where the data stands. ``due``: it is
        no stop or end of a phase that saves."""
        with self.monitor.during("saving"):
            if due:
                watch.due(self.progress, self.checkpoints, self.run.guard)
            if batches is not None:
                self.progress.data = gathered(batches.state())
            self.progress.monitor = self.monitor.state()
            step = self.progress.step
            progress, loss = dataclasses.asdict(self.progress), self.checkups.loss(step)
            self.checkpoints.save(step, state, progress, loss)


def train(
    run: Run,
    workdir: str | os.PathLike,
    *,
    restart: bool = False,
    stop: StopRequest | None = None,
    tokenizer: Tokenizer | None = None,
) -> Result:
    """Trains a run in its folder: a new one, or on from its last checkpoint.

    Args:
      run: everything that is computed follows from it.
      workdir: the run's folder; made if it is not there.
      restart: begin again from step 0 where the folder holds metrics but no checkpoint.
      stop: how a stop is asked for; None: by signals, where this is the main thread.
      tokenizer: of a new run; None: what ``run.tokenizer`` builds.

    Raises:
      ConfigError: an impossible choice, or a folder that holds something else; nothing has been
        written then.
      DataError: input that cannot be read, or a checkpoint that does not fit.
    """
    determinism.prepare(run.deterministic)
    run.validate(jax.device_count())
    folder = RunFolder(Path(workdir))
    layout, tokenizer = run.mesh.build(), folder.tokenizer(run, tokenizer)
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
        stop = stack.enter_context(stop or StopRequest())
        together.share(stop)
        stop.idle = lambda: together.alone  # so far nothing could be lost
        told = functools.partial(stop.request, signal.SIGTERM)
        stack.enter_context(notices(told))
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
        if together.first:
            environment.record(folder.path, progress.step, run.deterministic)
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
    return progress, (program, restored(checkpoints, step, program))


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
    tokenizer: Tokenizer | None = None,
) -> int:
    """``jaxpt train``: trains, then shows losses beside baselines, samples, and the report's path.

    Args:
      coordinator, processes, process_id: see ``distributed.detect``.
      tokenizer: see ``train``.

    Returns:
      The exit code: that of the signal where one stopped the run.
    """
    if dry_run:
        summary.show(run)
        return Exit.OK
    determinism.prepare(run.deterministic)
    use_compilation_cache()
    start(coordinator, processes, process_id)
    stop = StopRequest(run.checkpoint.grace, leaves=True)
    result = train(run, workdir, restart=restart, stop=stop, tokenizer=tokenizer)
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
    if early := result.progress.early:
        console.print("; ".join(early), soft_wrap=True)
    return Exit.DATA_ENDED if early else Exit.OK


def use_compilation_cache() -> None:
    """Keeps compiled programs in the cache folder, so that a run that goes on starts at once."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def total_steps(run: Run) -> int | None:
    """Steps of all phases, or None where that is not known beforehand."""
    steps = [phase.total_steps for phase in run.phases]
    return None if None in steps else sum(s for s in steps if s is not None)
