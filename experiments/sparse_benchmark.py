"""Sparse pretraining side by side: static, gradual and dynamic masks, at equal steps and at equal
FLOPs.

    python -m experiments.sparse_benchmark [--quick | --smoke] [--workdir DIR]

All arms hold a quarter of the entries of the layers' matrices in the end, or before they are made
dense. Arms called NAME_flops go on for as many steps as dense training's FLOPs allow, were products
with what is held all that is computed: a sparse matrix counts its density, averaged over the steps
as the schedule has it; the output projection and attention count in full. (Masked products are
dense in disguise: the FLOPs that are computed are more. Those of block-sparse ones are not.)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import low_rank_benchmark
from experiments.study import Arm, Size, Study, main
from experiments.verdicts import Relation, Relations
from jaxpt.data.tokenizers import Bytes
from jaxpt.growth import Convert
from jaxpt.growth.base import Update
from jaxpt.run import Phase, Run
from jaxpt.sparsity import Gradual, GraNet, RigL
from jaxpt.sparsity.schedules import cubic
from jaxpt.weights import Blocks, BlockSparse, Dense, Masked, Weight

VOCABULARY = 1024  # of BASE
DENSE_SHARE = 0.25  # of the steps of what becomes dense
Changes = Callable[[Run], dict[str, Any]]

BASE = low_rank_benchmark.BASE.replace(**{"model.width": 192, "model.mlp.width": 512, "steps": 300})
SCALED = (
    "LLaMA of 4 layers, width 192, on the source of Python's standard library in 1,024 pieces, "
    "hundreds of steps of 512 tokens: what two CPU cores do in an hour; the papers train 0.1 to "
    "1.3 billion parameters on billions of tokens."
)
SIZES = {
    "full": Size({}),
    "quick": Size({"steps": 60, "evaluate.batches": 8}, seeds=(0,)),
}
SMOKE = {
    "tokenizer": Bytes(),
    "steps": 8,
    "batch": 2,
    "length": 16,
    "model.width": 32,
    "model.layers": 1,
    "model.mlp.width": 48,
    "evaluate.batches": 1,
    "evaluate.every": None,
}


def smoke(*arms: str) -> Size:
    """Nothing is learned."""
    return Size(SMOKE, seeds=(0,), arms=arms)


def held(run: Run, weight: Weight) -> Any:
    """The run's model with its layers' matrices held so."""
    weights = (("*/attention/*", weight), ("*/mlp/*", weight), ("*", Dense()))
    return dataclasses.replace(run.model, weights=weights)


def sparse(weight: Weight, *updates: Update) -> Changes:
    """One phase with these masks."""
    return lambda run: {"model": held(run, weight), "updates": updates}


def often(updates: int, run: Run) -> int:
    """Steps between so many updates of the masks over a run."""
    return max(1, (run.phases[0].total_steps or 0) // updates)


def two_phases(run: Run, weight: Weight) -> tuple[Phase, Phase]:
    """Sparse, then a quarter of the steps dense at a third of the learning rate (SPDF)."""
    phase = run.phases[0]
    steps = phase.total_steps or 0
    last = max(1, round(DENSE_SHARE * steps))
    optimizer = dataclasses.replace(phase.optimizer, lr=phase.optimizer.lr / 3)
    begin = () if weight == Dense() else (Convert(),)
    return (
        dataclasses.replace(phase, name="first", steps=steps - last),
        dataclasses.replace(
            phase,
            name="dense",
            steps=last,
            model=held(run, Dense()),
            begin=begin,
            keep_optimizer=False,
            optimizer=optimizer,
        ),
    )


def then_dense(density: float) -> Changes:
    """Static masks of a density (1: none), then dense."""
    weight = Masked(density) if density < 1 else Dense()
    return lambda run: {"model": held(run, weight), "phases": two_phases(run, weight)}


def gradual(run: Run) -> dict[str, Any]:
    update = Gradual(density=0.25, every=often(60, run))
    return sparse(Masked(), update)(run)


def rigl(run: Run) -> dict[str, Any]:
    return sparse(Masked(0.25), RigL(every=often(30, run)))(run)


def granet(run: Run) -> dict[str, Any]:
    return sparse(Masked(0.5), GraNet(density=0.25, every=often(30, run)))(run)


def block(run: Run) -> dict[str, Any]:
    """A quarter of the blocks, the same ones throughout: the only arm that computes less."""
    smaller = min(32, run.model.width // 2)  # pyright: ignore[reportAttributeAccessIssue]
    return sparse(BlockSparse(0.25, Blocks(smaller, smaller)))(run)


def mean_density(first: float, last: float, start: float, stop: float, updates: int = 60) -> float:
    """Over training, of a cubic schedule between shares of it: density i from update i on."""
    densities = cubic(first, last, updates)
    return start * first + (stop - start) * float(np.mean(densities[:-1])) + (1 - stop) * last


def flops_share(run: Run, density: float) -> float:
    """FLOPs of a step over those of a dense one, were only what is held computed."""
    phase, model = run.phases[0], run.model.build(VOCABULARY)
    total = model.flops(phase.batch, phase.length)
    matrices = [p for path, p in model.products.items() if "lm_head" not in path]
    inner = sum(p.stack * 2.0 * p.d_in * p.d_out for p in matrices) * phase.batch * phase.length
    return 1 - (1 - density) * inner / total


def at_equal_flops(changes: Changes, density: float) -> Changes:
    """The arm with as many steps as a dense run's FLOPs allow."""

    def longer(run: Run) -> dict[str, Any]:
        steps = round((run.phases[0].total_steps or 0) / flops_share(run, density))
        run = run.replace(steps=steps)
        return {"steps": steps} | changes(run)

    return longer


KINDS: dict[str, tuple[Changes, float]] = {
    "spdf50": (then_dense(0.5), 0.5 * (1 - DENSE_SHARE) + DENSE_SHARE),
    "spdf75": (then_dense(0.25), 0.25 * (1 - DENSE_SHARE) + DENSE_SHARE),
    "gradual": (gradual, mean_density(1.0, 0.25, 0.25, 0.75)),
    "rigl": (rigl, 0.25),
    "granet": (granet, mean_density(0.5, 0.25, 0.0, 0.75, 30)),
    "block75": (block, 0.25),
}
STUDY = Study(
    name="sparse_benchmark",
    title="Sparse pretraining",
    claim=(
        "At equal FLOPs sparse pretraining loses nothing to dense: gradual pruning from 25% to 75% "
        "of training (Jin et al. 2025), and 50% sparse, then dense (Thangarasa et al. 2023)"
    ),
    scaled=SCALED,
    base=BASE,
    arms=(
        Arm("dense"),
        *(Arm(name, changes) for name, (changes, _) in KINDS.items()),
        *(
            Arm(f"{name}_flops", at_equal_flops(changes, density))
            for name, (changes, density) in KINDS.items()
        ),
    ),
    rule=Relations(
        Relation("gradual_flops", "<=", "dense", 0.02),
        Relation("spdf50_flops", "<=", "dense", 0.02),
        also=(
            Relation("rigl", "<", "block75"),
            Relation("granet", "<=", "rigl", 0.02),
            Relation("rigl_flops", "<=", "dense", 0.02),
        ),
    ),
    sizes=SIZES | {"smoke": smoke("dense", "spdf75")},
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
