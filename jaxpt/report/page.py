"""The page: everything that comes from a file is escaped, and nothing is loaded from anywhere."""

from __future__ import annotations

import html
import importlib.resources
import json
import math
import os
import re
import secrets
import shlex
from pathlib import Path
from typing import Any

from jaxpt.console import clock_time, short
from jaxpt.files import dumps, write_atomic
from jaxpt.report.charts import LABELS, chart_data
from jaxpt.report.records import Record, read_record

# Metrics of the last line that the table shows first, in this order; the others follow.
FIRST = ("loss", "accuracy", "lr", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
NAMES = LABELS | {"accuracy": "accuracy"}
DEEPEST = 40  # levels of a config that unfold
SHARES = ("mfu", "input_wait", "fill", "accuracy")


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes report.html into a run's folder, from what is there, and returns its path.

    Works at any moment of a run, and for an empty folder. Raises OSError where it cannot write.
    """
    return write_atomic(Path(workdir) / "report.html", page(read_record(workdir)), durable=False)


def page(record: Record) -> str:
    """The whole page as text."""
    from plotly.offline import get_plotlyjs

    # A fresh nonce for our two scripts: should a string slip in unescaped, it still cannot run.
    parts = {
        "nonce": secrets.token_urlsafe(16),
        "title": text(record.name),
        "css": _resource("page.css"),
        "head": _head(record),
        "problems": "".join(f"<p class=problem>{text(p)}</p>" for p in record.problems),
        "tiles": _tiles(record),
        "results": _results(record),
        "final": _final(record),
        "samples": _samples(record),
        "config": _config(record),
        "about": _about(record),
        "data": _script_json(chart_data(record)),
        "plotly": get_plotlyjs() if record.rows else "",
        "js": _resource("page.js"),
    }
    # One pass, so that a sample which reads like a placeholder stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _resource("page.html"))


def _resource(name: str) -> str:
    return importlib.resources.files("jaxpt.report").joinpath(name).read_text(encoding="utf-8")


def text(value: Any) -> str:
    """Any value as HTML text, also safe within quotes."""
    return html.escape(str(value), quote=True)


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return (
        dumps(value)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def figure(value: Any, metric: str = "") -> str:
    """A number as people write it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return text(value)
    if not math.isfinite(value):
        return str(value)
    if metric in SHARES:
        return f"{100 * value:.1f}%"
    if metric.endswith("_per_second") or metric == "memory_peak":
        return short(value)
    if isinstance(value, int):
        return f"{value:,}"
    magnitude = abs(value)
    if magnitude and (magnitude < 1e-2 or magnitude >= 1e6):
        return f"{value:.3g}"
    return f"{value:.4f}" if magnitude < 100 else f"{value:,.1f}"


def name_of(metric: str) -> str:
    """A metric's name for people; what follows a slash is a task's own name."""
    first, slash, task = metric.partition("/")
    return NAMES.get(first, first.replace("_", " ")) + slash + task


def _head(record: Record) -> str:
    state = record.status.get("state", "unknown" if record.rows else "empty")
    cause = record.status.get("cause")
    updated = record.status.get("updated")
    return "".join(
        [
            f"<h1>{text(record.name)}</h1><p class=state>",
            f"<span class='pill {text(state)}'>{text(state)}</span>",
            f" <span>{text(cause)}</span>" if cause else "",
            f" <span class=dim>as of {text(str(updated).replace('T', ' '))}</span>"
            if updated
            else "",
            "</p>",
        ]
    )


def _tiles(record: Record) -> str:
    last, status = record.last, record.status
    steps, total = last.get("step", status.get("step")), status.get("steps")
    losses = [t["loss"] for t in record.tasks.values() if "loss" in t]
    tiles = [
        ("Step", f"{steps:,}" + (f" / {total:,}" if total else "") if steps is not None else None),
        ("Tokens", short(last["tokens"]) if "tokens" in last else None),
        ("Time", clock_time(last["seconds"]) if "seconds" in last else None),
        ("Training loss", figure(last["loss"]) if "loss" in last else None),
        (
            "Validation loss" + (f", mean of {len(losses)}" if len(losses) > 1 else ""),
            figure(sum(losses) / len(losses)) if losses else None,
        ),
        ("Tokens/s", short(last["tokens_per_second"]) if "tokens_per_second" in last else None),
    ]
    return "".join(
        f"<div class=tile><div class=dim>{text(name)}</div><div class=big>{value}</div></div>"
        for name, value in tiles
        if value is not None
    )


HEADS = {"loss": "validation loss", "baseline": "unigram baseline"}
UNIT = "Losses in nats per target."
BASELINE = "The baseline is the entropy of the same targets, each counted without its context."


def _results(record: Record) -> str:
    if not record.tasks:
        return "<p class=dim>No evaluation yet.</p>"
    tasks = [
        task
        | (
            {"difference": task["loss"] - task["baseline"]}
            if task.keys() >= {"loss", "baseline"}
            else {}
        )
        for task in record.tasks.values()
    ]
    order = ("loss", "baseline", "difference", "accuracy", "targets", "tokens")
    columns = [c for c in order if any(c in task for task in tasks)]
    rows = []
    for name, task in zip(record.tasks, tasks, strict=True):
        cells = "".join(_cell(column, task.get(column)) for column in columns)
        rows.append(f"<tr><th scope=row>{text(name)}</th>{cells}</tr>")
    head = "".join(f"<th scope=col>{HEADS.get(c, c)}</th>" for c in columns)
    at = f"At step {figure(record.evaluated)}. " if record.evaluated is not None else ""
    return (
        f"<div class=scroll><table><thead><tr><th scope=col>task</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class=dim>{at}{UNIT} {BASELINE if 'baseline' in columns else ''}</p>"
    )


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "<td>–</td>"
    if column != "difference" or not math.isfinite(value):
        return f"<td>{figure(value, column)}</td>"
    sign, kind = ("−", "good") if value < 0 else ("+", "bad")
    return f"<td class={kind}>{sign}{abs(value):.4f}</td>"


def _pair(name: str, cell: str) -> str:
    """A row of two; ``cell`` is HTML."""
    return f"<tr><th scope=row>{text(name)}</th><td>{cell}</td></tr>"


def _pairs(rows: list[str], empty: str) -> str:
    if not rows:
        return f"<p class=dim>{empty}</p>"
    return f"<div class=scroll><table class=pairs><tbody>{''.join(rows)}</tbody></table></div>"


def _final(record: Record) -> str:
    last = {
        name: value
        for name, value in record.last.items()
        if isinstance(value, (int, float)) and not name.startswith("eval/")
    }
    names = [n for n in FIRST if n in last] + [n for n in last if n not in FIRST]
    rows = [_pair(name_of(n), figure(last[n], n)) for n in names]
    return _pairs(rows, "No metrics yet.")


def _samples(record: Record) -> str:
    if not record.samples:
        return "<p class=dim>No samples yet.</p>"
    cards = []
    for sample in record.samples:
        parts = "".join(
            f"<h4>{text(name)}</h4><pre class='part-{text(name)}'>{text(value)}</pre>"
            for name, value in sample.items()
            if name != "task"
        )
        task = f"<h3>{text(sample['task'])}</h3>" if sample.get("task") else ""
        cards.append(f"<article class=sample>{task}{parts}</article>")
    return "".join(cards)


def _config(record: Record) -> str:
    if record.config is None:
        return "<p class=dim>No config.json.</p>"
    return f"<div class=tree>{_tree('run', record.config)}</div>"


def _tree(name: str, value: Any, depth: int = 0) -> str:
    """Nested JSON that unfolds without a script."""
    if isinstance(value, dict) and value and depth < DEEPEST:
        items, hint = value.items(), str(value.get("type", "")).rpartition(":")[2]
    elif isinstance(value, list) and value and depth < DEEPEST:
        items, hint = enumerate(value), f"{len(value)} items"
    else:
        leaf = text(json.dumps(value, ensure_ascii=False))
        return f"<div class=leaf><span class=key>{text(name)}</span> <code>{leaf}</code></div>"
    inside = "".join(_tree(str(k), v, depth + 1) for k, v in items if k != "type")
    head = f"<summary>{text(name)} <span class=dim>{text(hint)}</span></summary>"
    return f"<details{'' if depth else ' open'}>{head}{inside}</details>"


def _about(record: Record) -> str:
    status = record.status
    command = status.get("command")
    if isinstance(command, list) and command:
        program = Path(str(command[0]))
        ours = {"__main__.py": "python -m jaxpt", "jaxpt": "jaxpt"}.get(program.name)
        rest = shlex.join(map(str, command[1:]))
        command = f"{ours or shlex.quote(str(program))} {rest}"
    pairs = [
        ("command", command),
        ("devices", status.get("devices")),
        ("host", status.get("host")),
        ("started", status.get("started")),
        ("resumed from step", status.get("resumed_from")),
        ("commit", status.get("commit")),
    ]
    versions = status.get("versions")
    pairs += list(versions.items()) if isinstance(versions, dict) else []
    rows = [_pair(name, f"<code>{text(v)}</code>") for name, v in pairs if v is not None]
    return _pairs(rows, "No status.json.")
