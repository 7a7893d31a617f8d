"""Attention under one mask rule: the public function, and a file each implementation."""

from kernels.attention.api import attention, shared_bias
from kernels.attention.bias import ALiBi, RelativeBias, alibi_slopes, materialize
from kernels.attention.rule import Consecutive
from kernels.attention.sharded import Split, sharded_attention

__all__ = [
    "ALiBi",
    "Consecutive",
    "RelativeBias",
    "Split",
    "alibi_slopes",
    "attention",
    "materialize",
    "sharded_attention",
    "shared_bias",
]
