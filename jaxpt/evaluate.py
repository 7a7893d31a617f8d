"""``jaxpt eval``: what a run's model is worth, at one checkpoint or at all of them.

The losses of the run's objective on any split, component by component; or tasks of lm_eval. Over
all checkpoints it is a series: a line each in ``probes/metrics.jsonl``, and ``probes/report.html``
with a curve of each figure against tokens.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console
from rich.table import Table

from jaxpt import examine, summary
from jaxpt.checkpoint import Checkpoints
from jaxpt.data.base import Split
from jaxpt.errors import ConfigError, Exit
from jaxpt.evaluation import Harness, Validation, logged, mean_loss
from jaxpt.examine import Results
from jaxpt.files import dumps, read_metrics, write_atomic
from jaxpt.folder import RunFolder
from jaxpt.loading import Loaded, load, quiet
from jaxpt.report import write_report
from jaxpt.run import Run
from jaxpt.summary import figures_table

PROBES = "probes"  # folder of a series, in the run's


def main(
    run: Run,
    *,
    workdir: str | os.PathLike,
    split: Split = "validation",
    at_step: int | None = None,
    all_checkpoints: bool = False,
    tasks: Sequence[str] = (),
    json: bool = False,
    **options: Any,
) -> int:
    """Prints what the model of the run in ``workdir`` comes to.

    Args:
      run: the folder's run; ``evaluate.batches`` says on how much, ``mesh`` where.
      split: which documents.
      at_step: of the checkpoint; None: the latest.
      all_checkpoints: all that there are, as a series.
      tasks: of lm_eval; with them its figures take the place of the losses.
      json: one JSON object: step, split, mean loss, and each component's loss, baseline,
        accuracy, number of targets, and what else its objective reports; or each task's figures.
        Of a series, "checkpoints": the lines of its file.
      options: further fields of ``Harness``.
    """
    if all_checkpoints and at_step is not None:
        raise ConfigError("--at-step", "means nothing with --all-checkpoints; give one of them")
    harness = harness_of(tasks, options)
    examine.check(harness)
    folder, measure = Path(workdir), Measure(split, harness)
    if all_checkpoints:
        rows = series(folder, measure, run=run)
        if json:
            print(dumps({"checkpoints": rows}))
            return Exit.OK
        console = rich.console.Console()
        console.print(_series_table(rows))
        console.print(f"report: {folder / PROBES / 'report.html'}", soft_wrap=True)
        return Exit.OK
    loaded = load(folder, at_step, run=run)
    results = measure(loaded)
    if json:
        own = {"tasks": results} if harness else {"loss": mean_loss(results), "tasks": results}
        print(dumps({"step": loaded.step, "split": split} | own))
        return Exit.OK
    console = rich.console.Console()
    for note in loaded.notes:
        console.print(note)
    if harness:
        console.print(f"step {loaded.step}")
        console.print(figures_table(results))
        return Exit.OK
    console.print(f"step {loaded.step}, {split} split, mean loss {mean_loss(results):.4f}")
    summary.show_results(results, console)
    return Exit.OK


def harness_of(tasks: Sequence[str], options: Mapping[str, Any]) -> Harness | None:
    """The tasks that a command line asks for, "a,b" taken apart; None where it asks for none.

    Raises:
      ConfigError: an option without a task that it could be for.
    """
    names = tuple(name for word in tasks for name in word.split(",") if name)
    given = {name: value for name, value in options.items() if value is not None}
    if not names and given:
        raise ConfigError(f"--{next(iter(given)).replace('_', '-')}", "is for --tasks; name some")
    try:
        return Harness(names, **given) if names else None
    except ConfigError as error:
        raise ConfigError(f"--{error.field.replace('_', '-')}", error.message) from None


class Measure:
    """Loaded -> results: the losses on a split, or a harness's figures. Validation batches are
    made once."""

    def __init__(self, split: Split = "validation", harness: Harness | None = None):
        self.split: Split = split
        self.harness = harness
        self._validations: dict[int, list[Validation]] = {}

    def __call__(self, loaded: Loaded) -> Results:
        if self.harness is not None:
            return examine.ask(loaded, self.harness)
        program, index = loaded.program, loaded.program.index
        if index not in self._validations:
            batches = loaded.run.evaluate.batches
            self._validations[index] = program.validations(loaded.tokenizer, batches, self.split)
        return examine.losses(loaded, self._validations[index], self.split)


def series(
    folder: Path, measure: Callable[[Loaded], Results], *, run: Run | None = None
) -> list[dict[str, Any]]:
    """Any evaluation over all checkpoints of a run: the rows of its file, in order of step.

    A row has "step", "tokens" (positions of all batches so far) and "eval/NAME/FIGURE" for each
    figure. The file keeps what other evaluations have found before. It is written, with its report,
    after each checkpoint.

    Args:
      folder: the run's.
      measure: what is evaluated; results have the form of ``examine.losses``.
      run: the folder's run, where it is at hand.

    Raises:
      ConfigError: the folder holds no checkpoint.
    """
    home = RunFolder(folder)
    if not home.checkpoints.is_dir():
        raise ConfigError("checkpoint", f"{folder} holds no checkpoint")
    with quiet(), Checkpoints(home.checkpoints, read_only=True) as checkpoints:
        progress = {step: checkpoints.progress(step) for step in checkpoints.steps()}
    out = folder / PROBES
    out.mkdir(exist_ok=True)
    rows = {row["step"]: row for row in read_metrics(out / "metrics.jsonl")}
    before: Loaded | None = None
    for step, reached in progress.items():
        loaded = load(folder, step, run=run)
        if before is not None and before.program.index == loaded.program.index:
            # What is compiled for one checkpoint of a phase serves the next.
            loaded = dataclasses.replace(loaded, program=before.program)
        before = loaded
        found = {f"eval/{name}": value for name, value in logged(measure(loaded)).items()}
        tokens = (reached.get("monitor") or {}).get("tokens", 0)
        rows[step] = rows.get(step, {}) | {"step": step, "tokens": tokens} | found
        ordered = [rows[at] for at in sorted(rows)]
        text = "".join(dumps(row) + "\n" for row in ordered)
        write_atomic(out / "metrics.jsonl", text.encode())
        write_report(out)
    return [rows[step] for step in progress]


def _series_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row a checkpoint, a column a figure."""
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith("eval/")))
    table = Table(title="checkpoints")
    for column in ("step", "tokens", *(name.removeprefix("eval/") for name in names)):
        table.add_column(column, justify="right")
    for row in rows:
        values = (f"{row[name]:.4f}" if name in row else "" for name in names)
        table.add_row(f"{row['step']:,}", f"{row['tokens']:,}", *values)
    return table
