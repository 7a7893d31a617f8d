"""A decoder a quarter of whose blocks are held, of which some are exchanged by gradient (RigL).

    jaxpt train configs/block_sparse_tiny.py

What is not held takes no memory and no work. ``SET`` in the place of ``RigL`` grows at random;
without either the first blocks, drawn at random, stay. ``LowRankPlusBlockSparse`` in the place of
``BlockSparse`` is SLTrain with blocks, whose support stays.
"""

from configs._sparse import phase, pretraining
from jaxpt.sparsity import RigL
from jaxpt.weights import Blocks, BlockSparse

run = pretraining(BlockSparse(0.25, Blocks(32, 32)), phase(RigL(every=25)))
