"""When and where masks change: methods of sparse training, a file each.

Which units of a matrix there are says its weight's pattern (``weights.Masked``); a phase's
``updates`` say what becomes of them.
"""

from jaxpt.sparsity.at_start import AtStart, Magnitude, Random, Score
from jaxpt.sparsity.base import Seen, Sparsify
from jaxpt.sparsity.evolution import SET
from jaxpt.sparsity.gradual import Gradual
from jaxpt.sparsity.granet import GraNet
from jaxpt.sparsity.grasp import GraSP
from jaxpt.sparsity.histogram import NearZero
from jaxpt.sparsity.movement import Movement
from jaxpt.sparsity.rigl import RigL
from jaxpt.sparsity.schedules import Periodic
from jaxpt.sparsity.snip import SNIP
from jaxpt.sparsity.straight_through import StraightThrough
from jaxpt.sparsity.structural import PruneGroups, Shrink
from jaxpt.sparsity.synflow import SynFlow

__all__ = [
    "SET",
    "SNIP",
    "AtStart",
    "GraNet",
    "GraSP",
    "Gradual",
    "Magnitude",
    "Movement",
    "NearZero",
    "Periodic",
    "PruneGroups",
    "Random",
    "RigL",
    "Score",
    "Seen",
    "Shrink",
    "Sparsify",
    "StraightThrough",
    "SynFlow",
]
