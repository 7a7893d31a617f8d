"""GraNet (Liu et al. 2021), sparse to sparse: from half of the entries to a quarter, pruned by
magnitude and regrown by gradient.

    jaxpt train configs/granet_tiny.py

``Masked()`` in the place of ``Masked(0.5)`` is dense to sparse.
"""

from configs._sparse import phase, pretraining
from jaxpt.sparsity import GraNet
from jaxpt.weights import Masked

run = pretraining(Masked(0.5), phase(GraNet(density=0.25, every=25)))
