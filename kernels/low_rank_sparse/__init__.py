"""The product with a matrix that is sparse plus low rank (SLTrain), which is never kept."""

from kernels.low_rank_sparse.api import low_rank_sparse, materialise
from kernels.low_rank_sparse.support import gather, held_shape, spread

__all__ = ["gather", "held_shape", "low_rank_sparse", "materialise", "spread"]
