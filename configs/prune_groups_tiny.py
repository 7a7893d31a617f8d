"""Channels and heads pruned by saliency while training, then the smaller model that is left
(EfficientLLM; Li et al. 2025).

    jaxpt train configs/prune_groups_tiny.py
"""

import dataclasses

from configs._sparse import model, phase, pretraining
from jaxpt.models.attention import Attention
from jaxpt.sparsity import PruneGroups, Shrink
from jaxpt.weights import Dense

small = dataclasses.replace(model(channels=192), attention=Attention(heads=2, head_dim=32))
pruning = phase(PruneGroups(channels=0.5, heads=0.5, every=10), name="prune", steps=450)
rest = dataclasses.replace(
    phase(name="small", steps=150), model=small, begin=(Shrink(),), keep_optimizer=False
)
run = pretraining(Dense(), pruning, rest)
