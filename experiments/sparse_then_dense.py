"""Sparse pretraining, then dense fine-tuning (SPDF).

    python -m experiments.sparse_then_dense [--quick | --smoke] [--workdir DIR]

Three quarters of the steps with a static random mask of 0, 50 or 75% of the layers' matrices, then
a quarter of the steps dense, all with the same two schedules. Thangarasa et al. 2023, "SPDF: Sparse
Pre-training and Dense Fine-tuning for Large Language Models": 75% sparsity at 1.3 billion
parameters has no significant loss downstream; smaller models lose a little.
"""

import sys

from experiments.sparse_benchmark import BASE, SCALED, SIZES, smoke, then_dense
from experiments.study import Arm, Study, main
from experiments.verdicts import Relation, Relations

STUDY = Study(
    name="sparse_then_dense",
    title="Sparse pretraining, then dense",
    claim=(
        "Pretrained at 50% or 75% sparsity a model is, after dense fine-tuning, about as good as "
        "one that was dense throughout (Thangarasa et al. 2023, tables 1 and 2)"
    ),
    scaled=f"{SCALED} The second phase goes on with the same text, where theirs changes the task.",
    base=BASE,
    arms=(
        Arm("dense", then_dense(1.0)),
        Arm("spdf50", then_dense(0.5)),
        Arm("spdf75", then_dense(0.25)),
    ),
    rule=Relations(
        Relation("dense", "~", "spdf50", 0.05),
        Relation("dense", "~", "spdf75", 0.05),
        also=(Relation("spdf50", "<=", "spdf75"),),
    ),
    sizes=SIZES | {"smoke": smoke("dense", "spdf75")},
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
