"""How a model knows where a token stands: in queries and keys, in the scores, or in the input."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kernels.attention as kernel
from jaxpt.errors import ConfigError
from jaxpt.mesh import constrain
from jaxpt.models.lookup import lookup
from jaxpt.models.scaling import RotaryScaling
from jaxpt.weights.base import Scope
from jaxpt.weights.init import FanIn, Normal


@dataclasses.dataclass(frozen=True)
class Positions:
    """Config of the position scheme; subclasses below each set what they need to."""

    def validate(self, length: int) -> None:
        """Raises ConfigError where rows of ``length`` positions cannot be served."""


@dataclasses.dataclass(frozen=True)
class NoPositions(Positions):
    """None at all: order is seen only through the causal mask."""


@dataclasses.dataclass(frozen=True)
class Rotary(Positions):
    """Rotary embedding of queries and keys (Su et al. 2021, eq. 34), by position in the example.

    Channel i is paired with channel i + R/2 (as LLaMA in Hugging Face's layout), where the first R
    of a head's H channels are rotated.
    """

    base: float = 10000.0  # wavelengths grow from 2 pi to 2 pi base
    fraction: float = 1.0  # share of a head's channels that is rotated, R = int(H fraction)
    scaling: RotaryScaling | None = None  # changes the frequencies, to read further; None: none
    local_base: float | None = None  # base in layers with a window (ModernBERT); None: the same

    def __post_init__(self):
        if not self.base > 1:
            raise ConfigError("base", f"{self.base} is not valid; it must be above 1")
        if not 0 < self.fraction <= 1:
            raise ConfigError("fraction", f"{self.fraction} is not valid; give above 0, up to 1")
        if self.local_base is not None and not self.local_base > 1:
            raise ConfigError("local_base", f"{self.local_base} is not valid; give above 1")

    @property
    def local(self) -> Rotary | None:
        """That of layers with a window, where it is another: it is not scaled."""
        if self.local_base is None:
            return None
        return Rotary(self.local_base, self.fraction)

    def channels(self, head_dim: int) -> int:
        """R, the number of channels of a head that are rotated."""
        return int(head_dim * self.fraction)

    def check(self, head_dim: int) -> None:
        """Raises ConfigError where heads of this width cannot be rotated."""
        channels = self.channels(head_dim)
        if channels < 2 or channels % 2:
            raise ConfigError(
                "attention.head_dim",
                f"of {head_dim} channels {channels} would be rotated, which Rotary cannot pair",
            )
        if self.scaling is not None:
            try:
                self.scaling.check(channels)
            except ConfigError as error:
                raise error.within("positions.scaling") from None

    def frequencies(self, head_dim: int, length: int) -> tuple[np.ndarray, float]:
        """The angle from one position to the next of each pair of channels, float64 [R/2], in rows
        of ``length`` positions; and the factor of cos and sin."""
        pairs = self.channels(head_dim) // 2
        frequencies = self.base ** (-np.arange(pairs) / pairs)
        if self.scaling is None:
            return frequencies, 1.0
        scaled = self.scaling.scaled(frequencies, self.base, length)
        return scaled, self.scaling.magnitude


@dataclasses.dataclass(frozen=True)
class RelativeBias(Positions):
    """T5's bias on scores (Raffel et al. 2020)."""

    buckets: int = 32  # rows of the table; halved in each direction where it is bidirectional
    max_distance: int = 128  # distances from here on share a bucket
    bidirectional: bool | None = None  # buckets for later keys; None: in encoders only, as T5
    per_layer: bool = False  # a table for each layer (umT5), not one that a stack's layers share

    def __post_init__(self):
        if self.buckets < 4 or self.buckets % 4:
            raise ConfigError("buckets", f"{self.buckets} is not valid; give a multiple of 4")
        if self.max_distance <= self.buckets // 2:
            raise ConfigError(
                "max_distance",
                f"{self.max_distance} must be above buckets / 2 = {self.buckets // 2}",
            )


@dataclasses.dataclass(frozen=True)
class ALiBi(Positions):
    """A penalty on scores that is linear in distance, steeper in some heads (Press et al. 2022)."""


@dataclasses.dataclass(frozen=True)
class Learned(Positions):
    """A learned vector for each position, added to the token's embedding."""

    max_length: int = 512  # positions there are
    offset: int = 0  # unused rows before that of position 0 (RoBERTa's table has 2)

    def __post_init__(self):
        if self.max_length < 1:
            raise ConfigError("max_length", f"{self.max_length} is not valid; give 1 or more")
        if self.offset < 0:
            raise ConfigError("offset", f"{self.offset} is not valid; give 0 or more")

    def validate(self, length):
        if length > self.max_length:
            raise ConfigError(
                "max_length", f"{self.max_length} positions cannot serve rows of {length}; raise it"
            )


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair of channels (i, i + R/2) by its angle (``rotary_angles``), in float32."""
    cos, sin = angles
    pairs = cos.shape[-1]
    a, b, rest = jnp.split(x_BTNH.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
    rotated = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*rotated, rest], axis=-1).astype(x_BTNH.dtype)


def rotary_angles(
    positions_BT: jax.Array, rotary: Rotary, head_dim: int, length: int
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of ``position * frequency``, each float32 [B, T, 1, R/2]; ``length`` is the
    row's: see ``RotaryScaling``."""
    frequencies, factor = rotary.frequencies(head_dim, length)
    angle = positions_BT.astype(jnp.float32)[..., None, None] * frequencies.astype(np.float32)
    return factor * jnp.cos(angle), factor * jnp.sin(angle)


class BiasTable(nnx.Module):
    """The relative bias of one stack, or of one layer."""

    def __init__(self, config: RelativeBias, scope: Scope, heads: int, width: int, encoder: bool):
        self.config = config
        self.bidirectional = encoder if config.bidirectional is None else config.bidirectional
        # Hugging Face and Mesh-TensorFlow draw it as a product of the model's width.
        self.w = scope.param(
            "w", (heads, config.buckets), ("heads", "buckets"), FanIn(), fan_in=width, kind="bias"
        )

    def __call__(self) -> kernel.RelativeBias:
        return kernel.RelativeBias(self.w[...], self.config.max_distance, self.bidirectional)


class PositionTable(nnx.Module):
    """Learned positions of one stack."""

    def __init__(self, config: Learned, scope: Scope, width: int):
        self.offset = config.offset
        shape = (config.max_length + config.offset, width)
        self.w = scope.param("w", shape, ("positions", "embed"), Normal(0.02), kind="embedding")

    def __call__(self, positions_BT: jax.Array, dtype) -> jax.Array:
        table = constrain(self.w[...], "positions", "width", name="positions")
        return lookup(table, positions_BT + self.offset).astype(dtype)
