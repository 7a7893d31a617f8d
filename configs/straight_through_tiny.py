"""2:4 sparsity by straight-through magnitude: all entries are trained, of every four consecutive
inputs the two largest are used.

    jaxpt train configs/straight_through_tiny.py
"""

from configs._sparse import phase, pretraining
from jaxpt.sparsity import StraightThrough
from jaxpt.weights import Groups, Masked

run = pretraining(
    Masked(1.0, Groups(4), trains="all"), phase(StraightThrough(density=0.5, every=1))
)
