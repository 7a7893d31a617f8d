"""The feed-forward layer."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpt.errors import ConfigError
from jaxpt.mesh import constrain
from jaxpt.models.recompute import recomputed
from jaxpt.weights.base import Scope
from jaxpt.weights.init import Constant, FanIn

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021 (Primer)
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # Hendrycks and Gimpel 2016, by erf
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # its tanh form (GPT-2, T5 1.1)
    "silu": jax.nn.silu,
}
Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu"]


@dataclasses.dataclass(frozen=True)
class MLP:
    """down(act(up(x))), or gated, down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    width: int | None = None  # hidden width F; None: four times the model's
    activation: Activation = "gelu_tanh"  # gelu is exact; relu2 is the squared ReLU
    gated: bool = False  # whether a second projection gates the first
    bias: bool = False  # whether the projections have biases
    dropout: float = 0.0  # rate on the hidden activations

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                "activation", f"{self.activation!r} is none of {', '.join(ACTIVATIONS)}"
            )
        if self.width is not None and self.width < 1:
            raise ConfigError("width", f"{self.width} is not valid; give 1 or more")
        check_rate("dropout", self.dropout)

    def build(self, scope: Scope, width: int) -> MLPModule:
        return MLPModule(self, scope, width)


def check_rate(field: str, rate: float) -> None:
    """Raises ConfigError unless 0 <= rate < 1."""
    if not 0 <= rate < 1:
        raise ConfigError(field, f"{rate} is not valid; a rate is at least 0 and below 1")


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability ``rate`` and scales the rest up; x itself without a key."""
    if rate == 0 or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def projection(module: nnx.Module, scope: Scope, name: str, d_in, d_out, axes, *, bias: bool):
    """Sets ``module.NAME`` (a weight) and, where asked, ``module.NAME_bias``."""
    setattr(module, name, scope.weight(name, d_in, d_out, axes, FanIn()))
    if bias:
        axis = "width" if axes[1] == "embed" else axes[1]
        value = scope.param(f"{name}_bias", (d_out,), (axis,), Constant(0.0), kind="bias")
        setattr(module, f"{name}_bias", value)


def project(module: nnx.Module, name: str, x: jax.Array) -> jax.Array:
    """x [..., d_in] through ``module.NAME`` and its bias, in x's dtype."""
    y = getattr(module, name)(x)
    bias = getattr(module, f"{name}_bias", None)
    return y if bias is None else y + bias[...].astype(y.dtype)


class MLPModule(nnx.Module):
    def __init__(self, config: MLP, scope: Scope, width: int):
        self.config = config
        hidden = config.width or 4 * width
        for name in ("gate", "up") if config.gated else ("up",):
            projection(self, scope, name, width, hidden, ("embed", "mlp"), bias=config.bias)
        projection(self, scope, "down", hidden, width, ("mlp", "embed"), bias=config.bias)

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        names = ("gate", "up") if self.config.gated else ("up",)
        hidden = [project(self, name, x_BTD) for name in names]

        def down(first, *others):
            h = activation(first)
            for other in others:
                h = h * other
            h = constrain(h, "batch", "length", "mlp", name="mlp/hidden")
            return project(self, "down", dropout(h, self.config.dropout, key))

        return recomputed(down)(*hidden)
