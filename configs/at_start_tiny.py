"""A mask chosen before the first step by what a batch says of each entry (SNIP; Lee et al. 2019).

    jaxpt train configs/at_start_tiny.py

``GraSP()``, ``SynFlow()`` and ``Magnitude()`` choose otherwise.
"""

from configs._sparse import phase, pretraining
from jaxpt.sparsity import SNIP, AtStart
from jaxpt.weights import Masked

run = pretraining(Masked(), phase(AtStart(SNIP(), 0.25, "global")))
