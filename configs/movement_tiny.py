"""Blocks of 32 x 32 pruned by trained scores (Lagunas et al. 2021, "Block Pruning For Faster
Transformers").

    jaxpt train configs/movement_tiny.py

Scores have ten times the learning rate of the entries (ours), and no decay.
"""

from configs._sparse import phase, pretraining
from jaxpt.optimizers import Group
from jaxpt.sparsity import Movement
from jaxpt.weights import Blocks, Masked

scores = Group("*/scores", lr_scale=10.0, weight_decay=0.0)
run = pretraining(
    Masked(1.0, Blocks(32, 32), trains="scores"),
    phase(Movement(density=0.25, every=10), groups=(scores,)),
)
