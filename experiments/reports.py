"""A study's results as Markdown, as plots, and as a line of the ledger in experiments/README.md."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.verdicts import Interval, difference, interval
from jaxpt.files import number, read_json, write_atomic

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results", HERE / "README.md"
MARKS = ("<!-- ledger: written by experiments/reports.py -->", "<!-- end of the ledger -->")
MISSING = "Plots need matplotlib: `pip install jaxpt[experiments]`."


def write(folder: Path, results: dict[str, Any]) -> None:
    """report.md, and curves.png and costs.png where matplotlib is installed."""
    plots = []
    if importlib.util.find_spec("matplotlib") is not None and results["runs"]:
        from experiments import plots as drawn  # matplotlib is an extra

        plots = drawn.write(folder, results)
    write_atomic(folder / "report.md", report(results, plots))


def report(results: dict[str, Any], plots: Sequence[str]) -> str:
    """The Markdown page of one study at one size."""
    tokens = {run["tokens"] for run in results["runs"]}
    said = ", ".join(f"{n:,}" for n in sorted(tokens))
    lines = [
        f"# {results['title']} ({results['size']})",
        f"**Claim.** {results['claim']}",
        f"**Here.** {results['scaled']} {said} tokens a run, seeds "
        f"{', '.join(map(str, results['seeds']))}.",
        f"**Rule, stated beforehand.** {results['rule']}",
        f"**Outcome: {results['outcome']}.**",
        *_relations(results["relations"]),
        *(["Beside the claim:", *_relations(results["also"])] if results["also"] else []),
        "## Losses and costs",
        "Validation loss in nats a target with its 95% interval over seeds; its mean difference "
        "from the first arm, paired by seed; training bytes are those of parameters, optimizer "
        "state and gradients; program bytes what the compiled step holds at once; seconds are of "
        "one run on the machine as it was.",
        table(costs(results)),
        *_tuning(results),
        *(f"![{Path(plot).stem}]({plot})" for plot in plots or ()),
        *([] if plots else [MISSING]),
        "## How",
        f"`{results['command']}`, {results['date']}, commit {' and '.join(results['commits'])}, "
        f"{results['device']}, {', '.join(f'{k} {v}' for k, v in results['versions'].items())}.",
        *_how_timed(results),
        "Arms, as changes of one base:",
        "\n".join(f"- `{arm['name']}`: {_changes(arm['changes'])}" for arm in results["arms"]),
    ]
    return "\n\n".join(lines) + "\n"


def costs(results: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each arm that has runs."""
    runs, first = results["runs"], results["arms"][0]["name"]
    timed = (results.get("timing") or {}).get("rates", {})
    rows = []
    for arm in results["arms"]:
        own = [run for run in runs if run["arm"] == arm["name"]]
        if not own:
            continue
        one, rate = own[0], timed.get(arm["name"], {}).get("tokens_per_second")
        apart = "" if arm["name"] == first else spread(difference(runs, first, arm["name"]), "+")
        rows.append(
            {
                "arm": arm["name"],
                **({str(results["tuned"]): _tuned(one["value"])} if results["tuned"] else {}),
                "loss": spread(interval([number(run["loss"]) for run in own])),
                f"less {first}": apart,
                "trained parameters": f"{one['parameters']:,}",
                "training MB": f"{one['training_bytes'] / 1e6:.1f}",
                "program MB": _megabytes(one["program_bytes"]),
                "model FLOPs": f"{one['flops']:.3g}",
                "tokens/s": f"{rate:,.0f}" if rate else "",
                "seconds": f"{np.median([number(run['seconds']) for run in own]):.0f}",
            }
        )
    return rows


def _tuned(value: float | None) -> str:
    return "the base's" if value is None else f"{value:g}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def spread(found: Interval, sign: str = "") -> str:
    """A mean and half its interval's width; nothing where there is no mean."""
    if math.isnan(found.mean) and math.isinf(found.half):
        return ""
    half = "" if math.isinf(found.half) else f" ± {found.half:.3f}"
    return f"{found.mean:{sign}.3f}{half}"


def table(rows: Sequence[dict[str, str]]) -> str:
    """As Markdown; the rows have the same keys."""
    if not rows:
        return "Nothing is finished yet."
    columns = list(rows[0])
    rule = ["---", *("---:" for _ in columns[1:])]
    lines = [columns, rule, *([row[c] for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _relations(lines: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        {
            "relation": f"`{r['asked']}`",
            "right less left": spread(Interval(number(r["mean"]), number(r["half"])), sign="+"),
            "outcome": r["outcome"],
        }
        for r in lines
    ]
    return [table(rows)] if rows else []


def _tuning(results: dict[str, Any]) -> list[str]:
    if not any(arm["tried"] for arm in results["arms"]):
        return []
    lines = []
    for arm in results["arms"]:
        tried = [(value, number(loss)) for value, loss in arm["tried"]]
        if not tried:
            continue
        best = min(tried, key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf)[0]
        ends = (min(v for v, _ in tried), max(v for v, _ in tried))
        shown = ", ".join(f"{value:g}: {loss:.3f}" for value, loss in sorted(tried))
        edge = " (at the edge of the grid)" if len(tried) > 1 and best in ends else ""
        lines.append(f"- `{arm['name']}`: {shown}; taken: {best:g}{edge}")
    head = (
        f"Choice of `{results['tuned']}` by the loss of one run each, on a seed and on validation "
        "text that are not in the table above:"
    )
    return ["## Tuning", head, "\n".join(lines)]


def _how_timed(results: dict[str, Any]) -> list[str]:
    timing = results.get("timing")
    if not timing:
        return []
    return [
        f"tokens/s: medians over turns of all arms' compiled steps, {timing['date']}, commit "
        f"{timing['commit']}, {timing['device']}, load average {timing['load']:.1f}."
    ]


def _changes(changes: dict[str, str]) -> str:
    return ", ".join(f"`{name}` = `{value}`" for name, value in changes.items()) or "the base"


def ledger() -> str:
    """A table of all results that the repository keeps, by study and size."""
    rows = []
    for path in sorted(RESULTS.glob("*/*/results.json")):
        found = read_json(path)
        rows.append(
            {
                "study": f"[{found['study']}]({path.parent.relative_to(HERE)}/report.md)",
                "claim": found["claim"],
                "size": found["size"],
                "outcome": found["outcome"],
                "date": found["date"],
            }
        )
    return table(rows).replace("---:", "---")


def with_ledger(page: str) -> str:
    """The page with the ledger between its marks. Raises ValueError where it has no marks."""
    if not all(mark in page for mark in MARKS):
        raise ValueError(f"no marks for the ledger: {' '.join(MARKS)}")
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{ledger()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def write_ledger() -> None:
    """The ledger of experiments/README.md, anew."""
    write_atomic(README, with_ledger(README.read_text(encoding="utf-8")))
