"""A full matrix."""

from __future__ import annotations

import dataclasses

import jax

from jaxpt.gather import in_use, narrowed
from jaxpt.mesh import Axes
from jaxpt.weights.base import Scope, Weight, WeightModule, replaced
from jaxpt.weights.product import product


@dataclasses.dataclass(frozen=True)
class Dense(Weight):
    """y = x W, with W [d_in, d_out] held as it is."""

    def build(self, scope, d_in, d_out, axes, init):
        return DenseModule(scope, d_in, d_out, axes, init)

    def flops(self, d_in, d_out):
        return 2 * d_in * d_out

    def parameters(self, d_in, d_out):
        return d_in * d_out


@dataclasses.dataclass(frozen=True)
class _Lies:
    """Logical axes of a matrix. (Flax would take a tuple for one of parameters.)"""

    axes: Axes


class DenseModule(WeightModule):
    def __init__(self, scope: Scope, d_in: int, d_out: int, axes, init):
        self.lies = _Lies(axes)
        self.w = scope.param("w", (d_in, d_out), axes, init, fan_in=d_in, fan_out=d_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        return product(x, in_use(self.w[...], self.lies.axes, x.dtype))

    @staticmethod
    def in_type(params, dtype):
        return {name: narrowed(w, dtype) for name, w in params.items()}

    def dense(self) -> jax.Array:
        return self.w[...]

    def from_dense(self, matrix: jax.Array) -> DenseModule:
        return replaced(self, w=matrix)
