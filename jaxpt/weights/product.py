"""The product that weights are built on."""

from kernels.product import product

__all__ = ["product"]
