"""SLTrain with blocks for its support: does it learn as well, and what does a step take?

    python -m experiments.block_sparse_sltrain [--quick | --smoke] [--workdir DIR]

Han et al. 2024 (SLTrain) add single entries at random places to a product of two thin matrices: in
table 2 that brings LLaMA 60M from 78.18 to 34.15, where full rank has 34.06. With such a support
the matrix has to be formed for every product, and a step costs more than a dense one's. With blocks
it need not, and a step costs a fraction. What it learns is not known: a block has as many numbers,
in fewer rows and columns, so that it adds less rank. The rule asks for at most 0.05 nats between
the two supports, at the same rank and the same number of parameters, and for both to be better than
low rank alone.

All is as in ``experiments.low_rank_benchmark``: its model, data and tuning.
"""

from __future__ import annotations

import dataclasses
import sys

from experiments.low_rank_benchmark import BASE, PLAIN, RANK, weights
from experiments.low_rank_benchmark import STUDY as PAPERS
from experiments.study import Arm, Study, main
from experiments.verdicts import Relation, Relations
from jaxpt.weights import (
    Blocks,
    BlockSparse,
    LowRank,
    LowRankPlusBlockSparse,
    SparsePlusLowRank,
    Uniform,
)

DENSITY = 1 / 32
ENTRIES = SparsePlusLowRank(RANK, 16.0, Uniform(DENSITY))
# Of 256 x 256 they hold 8 blocks of 16, or 2 of 32.
SMALL = LowRankPlusBlockSparse(RANK, 16.0, DENSITY, Blocks(16, 16))
LARGE = LowRankPlusBlockSparse(RANK, 16.0, DENSITY, Blocks(32, 32))
# As many numbers without A and B: a low rank of 64 is a half of 256 x 256 and 0.34 of 256 x 688.
ALONE = BlockSparse(0.4, Blocks(32, 32))

ARMS = (
    Arm("full", values=PLAIN),
    Arm("low_rank", weights(LowRank(RANK)), PLAIN),
    Arm("entries", weights(ENTRIES), PLAIN),
    Arm("blocks_16", weights(SMALL), PLAIN),
    Arm("blocks_32", weights(LARGE), PLAIN),
    Arm("blocks_alone", weights(ALONE), PLAIN),
)
SIZES = {
    name: dataclasses.replace(size, arms=("entries", "blocks_16") if name == "smoke" else None)
    for name, size in PAPERS.sizes.items()
}

STUDY = Study(
    name="block_sparse_sltrain",
    title="SLTrain with blocks for its support",
    claim=(
        "Low rank plus blocks ~ low rank plus single entries << low rank in validation loss, at "
        "equal parameters (our question; for single entries Han et al. 2024, table 2)"
    ),
    scaled=PAPERS.scaled,
    base=BASE,
    arms=ARMS,
    rule=Relations(
        Relation("blocks_16", "~", "entries", 0.05),
        Relation("entries", "<", "low_rank"),
        Relation("blocks_16", "<", "low_rank"),
        also=(
            Relation("blocks_32", "~", "blocks_16", 0.05),
            Relation("blocks_16", "<", "blocks_alone"),
        ),
    ),
    sizes=SIZES,
    tuned="optimizer.lr",
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
