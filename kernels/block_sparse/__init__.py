"""Products with matrices of which some blocks are held, and the rest are zero."""

from kernels.block_sparse.api import IMPLEMENTATIONS, block_sparse_matmul, chosen
from kernels.block_sparse.places import gather, grid_of, joined, norms, spread
from kernels.block_sparse.sharded import Split, sharded_block_sparse

__all__ = [
    "IMPLEMENTATIONS",
    "Split",
    "block_sparse_matmul",
    "chosen",
    "gather",
    "grid_of",
    "joined",
    "norms",
    "sharded_block_sparse",
    "spread",
]
