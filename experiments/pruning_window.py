"""When to prune while pretraining, and whether the average parameter count is what matters.

    python -m experiments.pruning_window [--quick | --smoke] [--workdir DIR]

Gradual pruning of three quarters of the layers' matrices within several windows of training, and
dense models of several sizes, one of them with as many parameters as the model pruned from 25% to
75% of training has on average. Jin et al. 2025, "The Journey Matters": that window is best, and the
loss is E + A / N^a (at one number of tokens) with N the parameters averaged over training, on one
curve for dense and sparse. The fit is written to law.json beside the results.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import reports
from experiments.sparse_benchmark import BASE, SCALED, SIZES, mean_density, often, smoke, sparse
from experiments.study import Arm, Study, main
from experiments.verdicts import Relation, Relations
from jaxpt.duration import share
from jaxpt.files import read_json, write_json
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.run import Run
from jaxpt.sparsity import Gradual
from jaxpt.weights import Masked

DENSITY = 0.25
UPDATES = 60  # of the masks, over all of training
WINDOWS = {"first_half": (0.0, 0.5), "middle": (0.25, 0.75), "last_half": (0.5, 1.0)}
# name -> (width, channels) of a dense model; the second has the average of "middle"
WIDTHS = {"dense": (192, 512), "dense_matched": (144, 352), "dense_small": (96, 256)}


def window(start: float, stop: float):
    def changes(run: Run) -> dict[str, Any]:
        update = Gradual(
            density=DENSITY, every=often(UPDATES, run), start=share(start), stop=share(stop)
        )
        return sparse(Masked(), update)(run)

    return changes


def dense(width: int, channels: int):
    def changes(run: Run) -> dict[str, Any]:
        scale = run.model.width / BASE.model.width  # pyright: ignore[reportAttributeAccessIssue]
        model = dataclasses.replace(  # pyright: ignore[reportCallIssue]
            run.model,
            width=round(width * scale / 8) * 8,
            attention=Attention(heads=4),
            mlp=MLP(width=round(channels * scale / 8) * 8, activation="silu", gated=True),
        )
        return {"model": model}

    return changes


def matrices(width: int, channels: int) -> int:
    """Entries of a layer's matrices."""
    return 4 * width**2 + 3 * width * channels


def averages() -> dict[str, float]:
    """Arm -> parameters of the layers' matrices, averaged over training, in full size."""
    layers = BASE.model.layers  # pyright: ignore[reportAttributeAccessIssue]
    full = layers * matrices(*WIDTHS["dense"])
    found = {name: float(layers * matrices(*sizes)) for name, sizes in WIDTHS.items()}
    for name, (start, stop) in WINDOWS.items():
        updates = round((stop - start) * UPDATES)
        found[name] = full * mean_density(1.0, DENSITY, start, stop, updates)
    return found


def fit(counts: Sequence[float], losses: Sequence[float]) -> dict[str, float]:
    """E, A, a of loss = E + A / N^a, and the root of the mean squared residual, by least squares:
    linear in E and A for each of many exponents. A >= 0."""
    n, y = np.asarray(counts, np.float64), np.asarray(losses, np.float64)
    best: dict[str, float] = {}
    for exponent in np.linspace(0.02, 2.0, 397):
        x = (n / n.mean()) ** -exponent
        slope = max(0.0, float(np.cov(x, y, bias=True)[0, 1] / np.var(x)))
        rest = y - slope * x
        error = float(np.sqrt(np.mean((rest - rest.mean()) ** 2)))
        if not best or error < best["rmse"]:
            best = {
                "E": float(rest.mean()),
                "A": slope * float(n.mean()) ** exponent,
                "a": float(exponent),
                "rmse": error,
            }
    return best


STUDY = Study(
    name="pruning_window",
    title="When to prune while pretraining",
    claim=(
        "Pruning from 25% to 75% of training is nearly the best window, and as good as a dense "
        "model with as many parameters on average (Jin et al. 2025, sections 3 and 4)"
    ),
    scaled=SCALED,
    base=BASE,
    arms=(
        *(Arm(name, dense(*sizes)) for name, sizes in WIDTHS.items()),
        *(Arm(name, window(*bounds)) for name, bounds in WINDOWS.items()),
    ),
    rule=Relations(
        Relation("middle", "<=", "first_half", 0.02),
        Relation("middle", "<=", "last_half", 0.02),
        Relation("middle", "~", "dense_matched", 0.05),
        also=(Relation("dense", "<", "dense_small"),),
    ),
    sizes=SIZES | {"smoke": smoke("dense", "middle")},
)


def law(results: dict[str, Any]) -> dict[str, Any]:
    """The law of the finished runs: of all together, and of dense ones alone."""
    counts = averages()
    pairs = [(run["arm"], counts[run["arm"]], float(run["loss"])) for run in results["runs"]]
    some = {"all": pairs, "dense": [p for p in pairs if p[0] in WIDTHS]}
    return {
        name: {"runs": len(each), **fit([n for _, n, _ in each], [y for *_, y in each])}
        for name, each in some.items()
        if len({n for _, n, _ in each}) >= 3
    } | {"average_parameters": counts}


def run(argv: Sequence[str] | None = None) -> int:
    """The study's command line, and then the law."""
    argv = list(sys.argv[1:] if argv is None else argv)
    code = main(STUDY, argv)
    label = next((s for s in ("smoke", "quick") if f"--{s}" in argv), "full")
    folder = Path(argv[argv.index("--workdir") + 1]) if "--workdir" in argv else None
    at = (folder or Path("runs") / STUDY.name) / label
    if "--publish" in argv:
        at = reports.RESULTS / STUDY.name / label
    found = law(read_json(at / "results.json"))
    write_json(at / "law.json", found)
    print(json.dumps(found))
    return code


if __name__ == "__main__":
    sys.exit(run())
