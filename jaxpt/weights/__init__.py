"""How one weight matrix is held: a file each. ``Dense`` is the plain matrix."""

from jaxpt.weights.base import Weight, WeightModule
from jaxpt.weights.block_sparse import BlocksInParts, BlockSparse, LowRankPlusBlockSparse
from jaxpt.weights.dense import Dense
from jaxpt.weights.init import Constant, FanIn, FanInUniform, Init, Normal, XavierUniform
from jaxpt.weights.lora import LoRA
from jaxpt.weights.low_rank import LowRank
from jaxpt.weights.masked import Masked
from jaxpt.weights.patterns import Blocks, Entries, Groups, Pattern
from jaxpt.weights.rows import Rows
from jaxpt.weights.sparse import Sparse
from jaxpt.weights.sparse_low_rank import SparsePlusLowRank
from jaxpt.weights.support import Grouped, Support, Uniform
from jaxpt.weights.two_four import TwoFour

__all__ = [
    "BlockSparse",
    "Blocks",
    "BlocksInParts",
    "Constant",
    "Dense",
    "Entries",
    "FanIn",
    "FanInUniform",
    "Grouped",
    "Groups",
    "Init",
    "LoRA",
    "LowRank",
    "LowRankPlusBlockSparse",
    "Masked",
    "Normal",
    "Pattern",
    "Rows",
    "Sparse",
    "SparsePlusLowRank",
    "Support",
    "TwoFour",
    "Uniform",
    "Weight",
    "WeightModule",
    "XavierUniform",
]
