"""UL2 on the embedded corpus under guard: spikes of the loss or of the gradient take the run back.

    jaxpt train configs/guarded_tiny.py

As ``ul2_tiny``, at a learning rate that is too high for it. Updates whose loss or gradient is not a
finite number are left out in every run; here a spike also takes the run back to the parameters of
the checkpoint before it, and on with the data after it (Chowdhery et al. 2022, "PaLM", section
5.1). What was left out stands in ``guard.jsonl``, with the batches; with ``deterministic`` the run
is the same on every GPU of a kind.
"""

import dataclasses

from configs.ul2_tiny import run as tiny
from jaxpt.guard import Guard

run = dataclasses.replace(
    tiny.replace(**{"optimizer.lr": 1.6e-2, "checkpoint.every": 50}),
    guard=Guard(spikes="roll_back", loss_score=8.0, gradient_score=12.0, window=50, most=5),
    deterministic=True,
)
