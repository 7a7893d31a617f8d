"""Plots of a study's results, by matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]  (an extra)
import numpy as np

from experiments.verdicts import interval
from jaxpt.files import number, write_atomic

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

SMOOTH = 0.05  # of the curve: share of its points that a moving mean is taken over


def write(folder: Path, results: dict[str, Any]) -> list[str]:
    """Draws curves.png and costs.png into a folder; returns their names."""
    return [
        _save(folder / "curves.png", curves(results)),
        _save(folder / "costs.png", costs(results)),
    ]


def by_arm(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Arm -> its finished runs, in the order of the arms; those without runs left out."""
    found = {
        arm["name"]: [run for run in results["runs"] if run["arm"] == arm["name"]]
        for arm in results["arms"]
    }
    return {name: runs for name, runs in found.items() if runs}


def curves(results: dict[str, Any]) -> Any:
    """Training loss against tokens: the mean over seeds, and a band from least to most."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, runs) in enumerate(by_arm(results).items()):
        length = min(len(run["curve"]) for run in runs)
        if not length:
            continue
        tokens = [point[0] for point in runs[0]["curve"][:length]]
        series = np.array([[number(p[1]) for p in run["curve"][:length]] for run in runs])
        window = max(1, round(SMOOTH * length))
        kernel = np.ones(window) / window
        smooth = np.array([np.convolve(line, kernel, "valid") for line in series])
        at = tokens[window - 1 :]
        style = "--" if i >= 10 else "-"  # the colours come round again after ten
        axes.plot(at, smooth.mean(0), style, label=name, linewidth=1.4)
        axes.fill_between(at, smooth.min(0), smooth.max(0), alpha=0.2)
    axes.set(xlabel="tokens", ylabel="training loss, nats a target", title=results["title"])
    if axes.lines:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def costs(results: dict[str, Any]) -> Any:
    """Validation loss against parameters and against training bytes, with intervals over seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    for axes, key, unit in zip(
        panels,
        ("parameters", "training_bytes"),
        ("trained parameters, millions", "parameters, gradients and optimizer state, MB"),
        strict=True,
    ):
        for i, (name, runs) in enumerate(by_arm(results).items()):
            found = interval([number(run["loss"]) for run in runs])
            half = found.half if np.isfinite(found.half) else 0
            marker = "os^Dv"[i % 5]
            axes.errorbar(runs[0][key] / 1e6, found.mean, half, fmt=marker, capsize=3, label=name)
        axes.set(xlabel=unit)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="validation loss, nats a target")
    panels[1].legend(fontsize=8)
    return figure


def _save(path: Path, figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    write_atomic(path, data.getvalue())
    return path.name
