"""How one weight matrix is held: a file each. ``Dense`` is the plain matrix."""

from jaxpt.weights.base import Weight, WeightModule
from jaxpt.weights.dense import Dense
from jaxpt.weights.init import Constant, FanIn, FanInUniform, Init, Normal, XavierUniform
from jaxpt.weights.lora import LoRA
from jaxpt.weights.low_rank import LowRank
from jaxpt.weights.rows import Rows
from jaxpt.weights.sparse_low_rank import SparsePlusLowRank
from jaxpt.weights.support import Grouped, Support, Uniform

__all__ = [
    "Constant",
    "Dense",
    "FanIn",
    "FanInUniform",
    "Grouped",
    "Init",
    "LoRA",
    "LowRank",
    "Normal",
    "Rows",
    "SparsePlusLowRank",
    "Support",
    "Uniform",
    "Weight",
    "WeightModule",
    "XavierUniform",
]
