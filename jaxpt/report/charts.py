"""Which curves the report draws, and in which frame: what belongs together stands together."""

from __future__ import annotations

import math
from typing import Any

from jaxpt.report.records import Record, Row, thin

# (title, unit, metrics); the first chart that names a metric has it. "#" stands for a task.
FRAMES = (
    ("Training loss", "nats per target", ("loss",)),
    ("Validation loss", "nats per target", ("eval/#/loss",)),
    ("Training loss by task", "nats per target", ("loss/#",)),
    ("Training loss by domain", "nats per target", ("domain_loss/#",)),
    ("Mixture", "share of rows", ("mixture/#",)),
    ("Targets by task", "share", ("tokens/#",)),
    ("Targets by domain", "share", ("domain_tokens/#",)),
    ("Passes over the data", "epochs", ("epoch", "epoch/#")),
    ("Accuracy", "share", ("accuracy", "accuracy/#", "eval/#/accuracy")),
    ("Learning rate", "", ("lr", "learning_rate")),
    ("Gradient and update norms", "", ("grad_norm", "update_norm")),
    ("Speed", "tokens/s", ("tokens_per_second",)),
    ("Utilisation and waiting", "share", ("mfu", "input_wait", "fill")),
    ("Step time", "s", ("step_seconds",)),
)
LABELS = {
    "loss": "loss",
    "accuracy": "training",
    "lr": "learning rate",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "update_norm": "update norm",
    "param_norm": "parameter norm",
    "tokens_per_second": "tokens/s",
    "examples_per_second": "examples/s",
    "step_seconds": "seconds a step",
    "mfu": "model FLOPs utilisation",
    "input_wait": "waiting for input",
    "fill": "real tokens / positions",
    "z_loss": "z-loss",
    "memory_peak": "peak device memory, bytes",
    "real_tokens": "real tokens",
    "cross_entropy": "cross-entropy",
}
AXES = ("step", "tokens", "seconds")
EXACT = {"lr", "learning_rate", "param_norm", "memory_peak"}  # without noise: never smoothed
NOT_CURVES = {*AXES, "real_tokens", "phase", "examples_per_second"}


def label(metric: str) -> str:
    """A curve's name within its chart."""
    parts = metric.split("/")
    if len(parts) > 1:
        return _task(metric)
    return LABELS.get(metric, metric.replace("_", " "))


def _matches(metric: str, pattern: str) -> bool:
    before, hole, after = pattern.partition("#")
    if not hole:
        return metric == pattern
    return metric.startswith(before) and metric.endswith(after) and len(metric) > len(pattern) - 1


def frames(metrics: list[str]) -> list[tuple[str, str, list[str]]]:
    """(title, unit, metrics) of each chart; a metric that no frame names has one of its own."""
    left = [m for m in metrics if m not in NOT_CURVES and not m.endswith(("/baseline", "/targets"))]
    charts = []
    for title, unit, patterns in FRAMES:
        found = [m for p in patterns for m in left if _matches(m, p)]
        found = list(dict.fromkeys(found))
        left = [m for m in left if m not in found]
        if found:
            charts.append((title, unit, found))
    return charts + [(LABELS.get(m, m.replace("_", " ")).capitalize(), "", [m]) for m in left]


def chart_data(record: Record) -> dict[str, Any]:
    """What the page's script draws, as JSON: axes and which is shown first, columns by metric (None
    where there is no finite number), charts, baselines by task, and where phases begin."""
    rows = thin(record.rows)
    metrics: dict[str, None] = {}
    for row in rows:
        metrics.update((k, None) for k, v in row.items() if isinstance(v, (int, float)))
    charts = [
        {
            "title": title,
            "unit": unit,
            "series": [
                {"metric": m, "label": label(m), "task": _task(m), "exact": _exact(m)}
                for m in found
            ],
        }
        for title, unit, found in frames(list(metrics))
    ]
    # A series of checkpoints has no clock; its axis is what was seen.
    timed = any("seconds" in row for row in rows) or not any("tokens" in row for row in rows)
    return {
        "axis": "step" if timed else "tokens",
        "axes": {axis: [r.get(axis) for r in rows] for axis in AXES},
        "columns": {s["metric"]: column(rows, s["metric"]) for c in charts for s in c["series"]},
        "charts": charts,
        "baselines": {
            name: task["baseline"]
            for name, task in record.tasks.items()
            if math.isfinite(task.get("baseline", math.nan))
        },
        "phases": _phases(rows),
    }


def column(rows: list[Row], metric: str) -> list[float | None]:
    return [_finite(row.get(metric)) for row in rows]


def _finite(value: Any) -> float | None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _exact(metric: str) -> bool:
    return metric in EXACT or metric.startswith("eval/")


def _task(metric: str) -> str:
    """The task that a curve belongs to, by which it has its colour; "" for none."""
    parts = metric.split("/")
    if parts[0] == "eval" and len(parts) > 2:
        return "/".join(parts[1:-1])
    return "/".join(parts[1:])


def _phases(rows: list[Row]) -> list[dict[str, Any]]:
    """Name and first row of each phase after the first."""
    found, before = [], None
    for i, row in enumerate(rows):
        phase = row.get("phase")
        if phase is not None and phase != before:
            if before is not None:
                found.append({"name": str(phase), "row": i})
            before = phase
    return found
