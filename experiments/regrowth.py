"""Whether masks that change are better than masks that stay: static, SET, RigL and GraNet.

    python -m experiments.regrowth [--quick | --smoke] [--workdir DIR]

All hold a fifth of the entries of the layers' matrices at the end; all but GraNet from the start.
Evci et al. 2020 (RigL), table 2: static < SET < RigL in accuracy at 80% sparsity; Liu et al. 2021
(GraNet), table 2: GraNet above RigL, and sparse to sparse as good as dense to sparse or better.
"""

import sys

from experiments.sparse_benchmark import BASE, SCALED, SIZES, often, smoke, sparse
from experiments.study import Arm, Study, main
from experiments.verdicts import Relation, Relations
from jaxpt.sparsity import SET, GraNet, RigL
from jaxpt.weights import Masked

DENSITY = 0.2
UPDATES = 30  # of the masks


def granet(first: float):
    def changes(run):
        return sparse(Masked(first), GraNet(density=DENSITY, every=often(UPDATES, run)))(run)

    return changes


STUDY = Study(
    name="regrowth",
    title="Masks that stay, and masks that change",
    claim=(
        "RigL is better than SET, which is better than a static mask (Evci et al. 2020, table 2); "
        "GraNet is better than RigL (Liu et al. 2021, table 2)"
    ),
    scaled=f"{SCALED} Theirs are image classifiers.",
    base=BASE,
    arms=(
        Arm("static", sparse(Masked(DENSITY))),
        Arm("set", lambda run: sparse(Masked(DENSITY), SET(every=often(UPDATES, run)))(run)),
        Arm("rigl", lambda run: sparse(Masked(DENSITY), RigL(every=often(UPDATES, run)))(run)),
        Arm("granet", granet(0.5)),
        Arm("granet_dense", granet(1.0)),
    ),
    rule=Relations(
        Relation("set", "<", "static"),
        Relation("rigl", "<", "set"),
        Relation("granet", "<", "rigl"),
        also=(Relation("granet", "<=", "granet_dense"),),
    ),
    sizes=SIZES | {"smoke": smoke("static", "rigl")},
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
