"""Gradual magnitude pruning to a quarter, from 25% to 75% of training (Jin et al. 2025).

    jaxpt train configs/gradual_tiny.py

The metric "average_active_parameters" is what their scaling law goes by.
"""

from configs._sparse import phase, pretraining
from jaxpt.sparsity import Gradual, NearZero
from jaxpt.weights import Masked

run = pretraining(Masked(), phase(Gradual(density=0.25, every=10), NearZero()))
