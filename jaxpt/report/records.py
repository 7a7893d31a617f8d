"""The run's folder as the report reads it, and the two small files that evaluation leaves there."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpt.files import NOT_FINITE, number, read_json, read_metrics, write_atomic, write_json
from jaxpt.status import read_status

MOST_POINTS = 4000  # of one curve; longer logs are thinned, highs and lows of the loss kept

Row = dict[str, Any]


def write_results(
    workdir: str | os.PathLike, step: int, tasks: Mapping[str, Mapping[str, Any]]
) -> Path:
    """results.json: what an evaluation found. See ``jaxpt.report`` for the fields of a task."""
    return write_json(Path(workdir) / "results.json", {"step": step, "tasks": dict(tasks)})


def write_samples(
    workdir: str | os.PathLike, step: int, samples: Sequence[Mapping[str, str]]
) -> Path:
    """samples.json, and samples.txt for reading. See ``jaxpt.report`` for a sample's parts."""
    text = [f"Samples at step {step}\n"]
    for sample in samples:
        parts = [f"{name}: {sample[name]}" for name in sample if name != "task"]
        text.append("\n".join([f"--- {sample.get('task', '')}".rstrip(), *parts, ""]))
    write_atomic(Path(workdir) / "samples.txt", "\n".join(text))
    return write_json(Path(workdir) / "samples.json", {"step": step, "samples": list(samples)})


@dataclasses.dataclass
class Record:
    """All that a run's folder holds for its report.

    rows: of metrics.jsonl, numbers as floats (not finite ones as NaN or infinities).
    problems: what could not be read, and what a reader should know first.
    """

    name: str
    config: Any = None
    status: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)
    tasks: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    evaluated: int | None = None  # the step of ``tasks``
    samples: list[dict[str, str]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def last(self) -> dict[str, Any]:
        """The newest value of each metric."""
        newest: dict[str, Any] = {}
        for row in self.rows:
            newest.update(row)
        return newest


def read_record(workdir: str | os.PathLike) -> Record:
    """Reads a run's folder; a file that is missing or broken costs its own part alone."""
    workdir = Path(workdir)
    record = Record(workdir.resolve().name)

    def attempt(read: Any, default: Any) -> Any:
        try:
            return read()
        except (ValueError, KeyError, OSError, TypeError, OverflowError) as error:
            record.problems.append(str(error))
            return default

    record.config = attempt(lambda: read_json(workdir / "config.json"), None)
    status = attempt(lambda: read_status(workdir), {})
    counts = ("step", "steps")
    record.status = {k: v for k, v in status.items() if k not in counts or _is_number(v)}
    record.rows = [_row(r) for r in attempt(lambda: read_metrics(workdir / "metrics.jsonl"), [])]
    results = attempt(lambda: read_json(workdir / "results.json"), None)
    record.evaluated, record.tasks = _results(results, record.rows)
    samples = attempt(lambda: read_json(workdir / "samples.json"), None)
    text = attempt(lambda: _text(workdir / "samples.txt"), "") if samples is None else ""
    record.samples = _samples(samples, text)
    bad = [r["step"] for r in record.rows if not math.isfinite(r.get("loss", 0.0))]
    if bad:
        record.problems.append(
            f"The loss is not finite on {len(bad)} lines, first at step {bad[0]}."
        )
    return record


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _row(row: Row) -> Row:
    """The numbers, those that are not finite as floats again, and the phase's name: all that a log
    should hold."""
    found = {k: number(v) if v is None or v in NOT_FINITE else v for k, v in row.items()}
    return {k: v for k, v in found.items() if _is_number(v) or k == "phase"}


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


def _results(results: Any, rows: Iterable[Row]) -> tuple[int | None, dict[str, dict[str, float]]]:
    """Results by task: those of results.json, else the newest evaluation in the log."""
    tasks: dict[str, dict[str, float]] = {}
    step = None
    if isinstance(results, dict) and isinstance(results.get("tasks"), dict):
        found = {k: v for k, v in results["tasks"].items() if isinstance(v, dict)}
        for name, values in found.items():
            tasks[name] = {k: v for k, v in _row(values).items() if _is_number(v)}
        return results.get("step"), tasks
    for row in rows:
        for key, value in row.items():
            parts = key.split("/")
            if len(parts) >= 3 and parts[0] == "eval" and isinstance(value, (int, float)):
                tasks.setdefault("/".join(parts[1:-1]), {})[parts[-1]] = value
                step = row["step"]
    return step, tasks


def _samples(samples: Any, text: str) -> list[dict[str, str]]:
    if isinstance(samples, dict):
        samples = samples.get("samples")
    if isinstance(samples, list):
        return [{str(k): str(v) for k, v in s.items()} for s in samples if isinstance(s, dict)]
    return [{"output": text}] if text.strip() else []


def thin(rows: list[Row], most: int = MOST_POINTS) -> list[Row]:
    """At most about ``most`` training rows: from each stretch those of lowest and highest loss, and
    the last row. Rows with an evaluation all stay."""
    if len(rows) <= most:
        return rows
    size = math.ceil(2 * len(rows) / most)
    kept: set[int] = {len(rows) - 1}
    for start in range(0, len(rows), size):
        stretch = range(start, min(start + size, len(rows)))
        losses = [i for i in stretch if math.isfinite(rows[i].get("loss", math.nan))]
        if losses:
            kept |= {
                min(losses, key=lambda i: rows[i]["loss"]),
                max(losses, key=lambda i: rows[i]["loss"]),
            }
        else:
            kept.add(start)
        kept |= {i for i in stretch if any(k.startswith("eval/") for k in rows[i])}
    return [rows[i] for i in sorted(kept)]
