"""Sparse pretraining, then dense fine-tuning (SPDF; Thangarasa et al. 2023).

    jaxpt train configs/spdf_tiny.py

A static random mask of three quarters of every matrix, then all of it: what was masked begins at 0,
with fresh moments.
"""

import dataclasses

from configs._sparse import model, phase, pretraining
from jaxpt.growth import Convert
from jaxpt.weights import Masked

sparse = phase(name="sparse", steps=450)
dense = dataclasses.replace(
    phase(name="dense", steps=150), model=model(), begin=(Convert(),), keep_optimizer=False
)
run = pretraining(Masked(0.25), sparse, dense)
