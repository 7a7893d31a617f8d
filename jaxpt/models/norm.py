"""Normalisation over the width axis, in float32."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpt.errors import ConfigError
from jaxpt.models.recompute import recomputed
from jaxpt.weights.base import Scope
from jaxpt.weights.init import Constant


@dataclasses.dataclass(frozen=True)
class Norm:
    """Config of a norm; subclasses below. ``build`` gives a module x [..., d] -> [..., d]."""

    def build(self, scope: Scope, width: int) -> nnx.Module:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + epsilon) * scale (Zhang and Sennrich 2019, eq. 4)."""

    epsilon: float = 1e-6  # added to the mean square

    def __post_init__(self):
        _positive(self.epsilon)

    def build(self, scope, width):
        return RMSNormModule(self, scope, width)


@dataclasses.dataclass(frozen=True)
class LayerNorm(Norm):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias (Ba et al. 2016)."""

    epsilon: float = 1e-5  # added to the variance
    bias: bool = True  # whether there is a bias

    def __post_init__(self):
        _positive(self.epsilon)

    def build(self, scope, width):
        return LayerNormModule(self, scope, width)


def _positive(epsilon: float) -> None:
    if not epsilon > 0:
        raise ConfigError("epsilon", f"{epsilon} is not valid; it must be above 0")


def _from_input(call):
    """A norm's ``__call__``, of which remat may keep the input alone, in its own dtype."""

    @functools.wraps(call)
    def run(self, x):
        return recomputed(functools.partial(call, self))(x)

    return run


class RMSNormModule(nnx.Module):
    def __init__(self, config: RMSNorm, scope: Scope, width: int):
        self.epsilon = config.epsilon
        self.scale = scope.param("scale", (width,), ("width",), Constant(1.0), kind="norm")

    @_from_input
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.epsilon)
        return (y * self.scale[...]).astype(x.dtype)


class LayerNormModule(nnx.Module):
    def __init__(self, config: LayerNorm, scope: Scope, width: int):
        self.epsilon, self.biased = config.epsilon, config.bias
        self.scale = scope.param("scale", (width,), ("width",), Constant(1.0), kind="norm")
        if config.bias:
            self.bias = scope.param("bias", (width,), ("width",), Constant(0.0), kind="norm")

    @_from_input
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.epsilon) * self.scale[...]
        return (y + self.bias[...] if self.biased else y).astype(x.dtype)
