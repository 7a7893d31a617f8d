"""RigL (Evci et al. 2020): a quarter of the entries, spread by Erdos-Renyi, of which some are
exchanged by gradient every 25 steps.

    jaxpt train configs/rigl_tiny.py

``SET(every=25)`` in the place of ``RigL`` grows at random; ``Masked(0.25)`` without ``AtStart`` has
a quarter of every matrix, ``Masked(0.5, Groups(4))`` has 2:4.
"""

from configs._sparse import phase, pretraining
from jaxpt.sparsity import AtStart, Random, RigL
from jaxpt.weights import Masked

run = pretraining(Masked(), phase(AtStart(Random(), 0.25, "erk"), RigL(every=25)))
