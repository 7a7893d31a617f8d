"""What a run tells: metrics, rates, where it stands, and its report.

``MonitorSession`` is what the training loop talks to:

    with MonitorSession(run.monitor, workdir, total_steps=1000) as monitor:
        monitor.begin("train", tokens=batch * length, examples=batch, flops=flops)
        for step in range(1, 1001):
            with monitor.wait():
                batch = next(loader)
            state, metrics = train_step(state, batch, key)
            monitor.log(step, metrics)
            if step % 500 == 0:
                with monitor.during("evaluating"):
                    losses = evaluate(state.params)
                monitor.evaluation(step, losses)
                with monitor.during("saving"):
                    checkpoints.save(step, state, monitor.state())

``log`` reads the metrics of the step *before*, after this one has been dispatched: so reading
waits for work that is done or about to be, and the device always has its next step.

Lines of metrics.jsonl have "step"; "tokens" (positions of all batches so far, padding included)
and "real_tokens"; "seconds" (of work since the run began, over all its sessions, with compiling,
evaluating and saving). Training lines add "phase", "loss" and the step's other metrics, as means
over the steps since the line before (for those of tasks and of parts of mixed data see
``loss_function`` and ``Mixture``), and rates (see ``Meter.rates``). Evaluation lines add
"eval/NAME/loss"; a step that has both is one line. Not finite numbers are strings (``files.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import jax

from jaxpt import hardware
from jaxpt.console import Console, Off, open_console
from jaxpt.duration import Duration, as_duration
from jaxpt.errors import ConfigError
from jaxpt.meter import Clock, Meter, Sums, on_host
from jaxpt.status import State, Status, outcome
from jaxpt.writers import MetricsFile, TensorBoard, Wandb, Writer


@dataclasses.dataclass(frozen=True)
class Monitor:
    """What to log, where and how often."""

    every: int | float | Duration = 10  # how often to log: steps, or any duration (10seconds)
    tensorboard: bool = True  # write event files for TensorBoard
    wandb: str | None = None  # project of Weights & Biases to log to as well (extra: wandb)
    profile: tuple[int, int] | None = None  # first and last step to trace into the folder profile
    console: Literal["auto", "rich", "plain", "off"] = "auto"  # progress bar, lines, or nothing
    measure_peak: bool = False  # time matrix products where the chip's peak is not known (CPUs)

    def __post_init__(self):
        every = as_duration(self.every)
        if every.value <= 0 or every.unit == "epochs":
            raise ConfigError(
                "every",
                f"{every} is not valid; give steps, tokens, examples, seconds or a share, above 0",
            )
        if self.wandb is not None and not self.wandb.strip():
            raise ConfigError("wandb", "the project's name is empty; give a name or None")
        if self.console not in ("auto", "rich", "plain", "off"):
            raise ConfigError("console", f"{self.console!r} is not one of auto, rich, plain, off")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ConfigError(
                "profile", f"{self.profile} is not valid; give the first and the last step, from 1"
            )


class _Pending(NamedTuple):
    """A step that has been dispatched and not yet read."""

    step: int
    metrics: Mapping[str, Any]
    extra: Mapping[str, Any]


class MonitorSession:
    """One process's watch over a run, from start or resume to its end. Use as a context manager.

    Only process 0 writes; the others keep the same pace and write nothing.

    Args:
      config: what to log.
      workdir: the run's folder.
      step: the step that the run goes on at; 0 for a new one.
      total_steps: steps of the whole run, or None where they are not known beforehand.
      state: what ``state()`` returned at ``step``, from the checkpoint. Without it, sums of an
        unfinished interval are lost and tokens are taken from the log.
      run_config: the run as JSON, for Weights & Biases.
      devices: those of the run (default: all).
      stream: where the console goes (default: standard output).
      clock: seconds; tests give their own.

    Raises:
      ConfigError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        config: Monitor,
        workdir: str | os.PathLike,
        *,
        step: int = 0,
        total_steps: int | None = None,
        state: Mapping[str, Any] | None = None,
        run_config: Any = None,
        devices: list[hardware.Device] | None = None,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ):
        self.config, self.workdir, self.total_steps = config, Path(workdir), total_steps
        self.step = step  # the last step whose metrics have been read
        self.means: dict[str, float] = {}  # metrics of the interval so far
        self._clock, self._began = clock, clock()
        self._devices = devices or jax.devices()
        peak = hardware.total_peak(self._devices, measure=config.measure_peak)
        self._meter = Meter(clock=clock, peak=peak)
        self._writers: list[Writer] = []
        self._status: Status | None = None  # process 0 alone has one
        self._console: Console = Off()
        saved = self._open(step, run_config, stream) if jax.process_index() == 0 else {}
        self._missing = step - int(saved.get("step", 0)) if state is None else 0
        saved = saved if state is None else state
        self.tokens = int(saved.get("tokens", 0))  # positions of all batches so far
        self.real_tokens = int(saved.get("real_tokens", 0))  # those that are not padding
        self._seconds_before = float(saved.get("seconds", 0.0))
        self._sums = Sums(saved.get("sums"))
        self._pending: _Pending | None = None
        self._phase, self._activity = str(saved.get("phase", "")), "starting"
        self._every: int | None = None  # steps between lines; None: it goes by the clock
        self._row_time = self._phase_time = clock()
        self._seconds_left: float | None = None
        self._pace: tuple[int, float] | None = None  # a step and its time, to foresee the end by
        self._rate: float | None = None  # positions a second of the last interval
        self._tracing = self._warned = False
        self._stopped: str | None = None
        self._at_end: str | None = None

    def _open(self, step: int, run_config: Any, stream: TextIO | None) -> dict[str, Any]:
        """Opens what process 0 writes to; returns the last line of the log that stays."""
        log = MetricsFile(self.workdir / "metrics.jsonl", step)
        self._writers.append(log)
        if self.config.tensorboard:
            self._writers.append(TensorBoard(self.workdir / "tensorboard", step))
        if self.config.wandb:
            self._writers.append(Wandb(self.config.wandb, self.workdir, run_config))
        devices = f"{len(self._devices)} x {self._devices[0].device_kind}"
        self._status = Status(self.workdir, devices, step, self._clock)
        self._console = open_console(self.config.console, self.total_steps, stream)
        if log.dropped:
            self.note(f"metrics.jsonl: {log.dropped} lines that come again or were torn are gone")
        return log.last

    @property
    def seconds(self) -> float:
        """Seconds of work since the run began, over all its sessions."""
        return self._seconds_before + self._clock() - self._began

    def begin(
        self,
        phase: str,
        *,
        tokens: int,
        examples: int,
        flops: float | None = None,
        phase_steps: int | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """A phase begins, or goes on after a resume.

        Args:
          tokens: positions of one step's batch, all streams together.
          examples: rows of one step's batch.
          flops: the model's operations of one step (forward and backward) on all devices.
          phase_steps: steps of the phase, for an interval that is a share of it.
          seconds_left: for a phase of so many seconds, what is left of them.

        Raises:
          ConfigError: ``every`` cannot be told in steps here.
        """
        self.flush()
        if phase != self._phase and self._sums:
            self._row()
        every = as_duration(self.config.every)
        self._every = every.in_steps(
            tokens_per_step=tokens, batch=examples, phase_steps=phase_steps or self.total_steps
        )
        if self._every is None and every.unit != "seconds":
            raise ConfigError(
                "monitor.every", f"{every}, but the steps of this phase are not known; give steps"
            )
        self._meter = dataclasses.replace(
            self._meter, tokens=tokens, examples=examples, flops=flops
        )
        self.tokens, self._missing = self.tokens + self._missing * tokens, 0
        self._phase, self._phase_time = phase, self._clock()
        self._seconds_left, self._pace = seconds_left, None
        self._show("compiling")
        self._trace(self.step)
        self._write_status()

    def wait(self) -> contextlib.AbstractContextManager[None]:
        """Around the wait for the next batch."""
        return self._meter.waiting()

    def log(
        self, step: int, metrics: Mapping[str, Any], extra: Mapping[str, Any] | None = None
    ) -> None:
        """``step`` has been dispatched; waits for the step before, and reads that.

        Args:
          metrics: name -> (sum, count) or scalar, on the device; "tokens": real ones of the batch.
          extra: the same, known on the host (the learning rate, say).
        """
        for value in metrics.values():
            for leaf in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(leaf, jax.Array):
                    leaf.copy_to_host_async()
        before, self._pending = self._pending, _Pending(step, metrics, extra or {})
        if before is not None:
            self._read(before)
        self._trace(step)

    def flush(self) -> None:
        """Waits for the last step that was dispatched, and reads it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._read(pending)

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Around work that is no step ("evaluating", "saving"): all steps are read and written
        before it begins, and it does not count in the rates."""
        self.flush()
        self._show(activity)
        try:
            with self._meter.paused():
                yield
        finally:
            self._show(self._phase)

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        """Results at ``step``: {"NAME": {"loss": number, ...}} or {"NAME/loss": number}; a number
        may be a (sum, count) pair."""
        self.flush()
        sums = Sums()
        for name, value in results.items():
            group = value if isinstance(value, Mapping) else {"": value}
            sums.add({f"eval/{name}/{k}".rstrip("/"): v for k, v in group.items()})
        means = sums.means()
        self._write(step, means)
        losses = [f"{n[5:-5]} {v:.4f}" for n, v in means.items() if n.endswith("/loss")]
        others = [f"{n[5:]} {v:.4f}" for n, v in means.items()] if not losses else []
        self.note(
            "  ".join([f"step {step}:" + " validation loss" * bool(losses), *losses, *others])
        )

    def note(self, text: str) -> None:
        """Shows a line that stays."""
        self._console.note(text)

    def state(self) -> dict[str, Any]:
        """For the checkpoint (JSON): with it, a resumed run's log is that of a straight one."""
        self.flush()
        counts = {"tokens": self.tokens, "real_tokens": self.real_tokens, "seconds": self.seconds}
        return counts | {"phase": self._phase, "sums": self._sums.state()}

    def abandon(self, cause: str, state: State = "failed") -> None:
        """The process is about to be ended from another thread: status.json will say why."""
        self._write_status(state, cause)

    def stop(self, cause: str) -> None:
        """The run ends here before its time, on request: status.json will say why."""
        self._stopped = cause

    def note_end(self, lines: Sequence[str]) -> None:
        """What status.json says beside "finished"."""
        self._at_end = "; ".join(lines) or None

    def _read(self, pending: _Pending) -> None:
        values = {name: on_host(value) for name, value in pending.metrics.items()}
        self._meter.done(pending.step)
        real = values.pop("tokens", None)
        self.step = pending.step
        self.tokens += self._meter.tokens
        self.real_tokens += int(real) if real is not None else 0
        self._sums.add(values)
        self._sums.add(pending.extra)
        self.means = self._sums.means()
        if self._activity == "compiling":
            self._show(self._phase)
        now = self._clock()
        self._pace = self._pace or (self.step, now)
        self._warn()
        if self._due(now):
            self._row()
        rate = self._rate or self._meter.rates().get("tokens_per_second")
        self._console.update(self.step, self.means.get("loss"), rate, self._left(now))
        if self._status and self._status.due():
            self._write_status()

    def _due(self, now: float) -> bool:
        if self.step == self.total_steps:
            return True
        if self._every is not None:
            return self.step % self._every == 0
        return now - self._row_time >= as_duration(self.config.every).value

    def _left(self, now: float) -> float | None:
        """Seconds to the end, at the pace since the phase's first step, pauses included."""
        if self._seconds_left is not None:
            return max(0.0, self._seconds_left - (now - self._phase_time))
        if self.total_steps is None or self._pace is None or self.step == self._pace[0]:
            return None
        per_step = (now - self._pace[1]) / (self.step - self._pace[0])
        return per_step * (self.total_steps - self.step)

    def _warn(self) -> None:
        bad = not math.isfinite(self.means.get("loss", 0.0))
        if bad and not self._warned:
            self.note(f"step {self.step}: the loss is not finite ({self.means['loss']})")
        self._warned = bad

    def _row(self) -> None:
        self._row_time = self._clock()
        rates = self._meter.interval()
        self._rate = rates.get("tokens_per_second", self._rate)
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        memory = {} if peak is None else {"memory_peak": peak}
        self._write(self.step, {"phase": self._phase, **self._sums.take(), **rates, **memory})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        real = {"real_tokens": self.real_tokens} if self.real_tokens else {}
        row = {"tokens": self.tokens, **real, "seconds": round(self.seconds, 3), **values}
        for writer in self._writers:
            writer.write(step, row)

    def _show(self, activity: str) -> None:
        self._activity = activity
        self._console.activity(activity)

    def _write_status(self, state: State = "running", cause: str | None = None) -> None:
        progress: dict[str, Any] = {"step": self.step, "steps": self.total_steps}
        progress |= {
            "phase": self._phase,
            "loss": self.means.get("loss"),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
        }
        if self._status is not None:
            self._status.write(state, cause, progress)

    def _trace(self, step: int) -> None:
        """Starts the trace before its first step is dispatched, stops it when its last is done."""
        first, last = self.config.profile or (0, 0)
        if not self._tracing and first and step + 1 == first:
            self.flush()
            jax.profiler.start_trace(os.fspath(self.workdir / "profile"))
            self._tracing = True
        elif self._tracing and step >= last:
            with self.during("writing the profile"):
                self._stop_trace()

    def _stop_trace(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            self.note(f"profile of steps {self.config.profile}: {self.workdir / 'profile'}")

    def __enter__(self) -> MonitorSession:
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        """Reads the last step, closes every writer whatever happens, and says how the run ended.

        A run that finished or failed leaves a line for its last step; one that was stopped goes
        on later, and its unfinished interval is in ``state``.
        """
        last_line = isinstance(error, Exception) or (error is None and self._stopped is None)
        failures: list[Exception] = []

        def attempt(action: Callable[[], None]) -> None:
            try:
                action()
            except Exception as failure:  # noqa: BLE001 (raised or told below, when all is closed)
                failures.append(failure)

        attempt(self.flush)
        attempt(self._stop_trace)
        if last_line and self._sums:
            attempt(self._row)
        for writer in self._writers:
            attempt(writer.close)
        cause = error or (failures[0] if failures else None)
        attempt(lambda: self._write_status(*outcome(cause, self._stopped, self._at_end)))
        attempt(self._console.close)
        if failures and error is None:
            raise failures[0]
        for failure in failures:
            assert error is not None
            error.add_note(f"and while closing the log, {type(failure).__name__}: {failure}")
