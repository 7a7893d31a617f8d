"""A frozen matrix plus a trained low-rank one (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large
Language Models", section 4.1)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.weights.base import FROZEN, Scope, Weight, WeightModule, replaced
from jaxpt.weights.init import Constant, FanInUniform
from jaxpt.weights.int8 import BLOCK, dequantise, quantise
from jaxpt.weights.low_rank import check_rank, rank_of
from jaxpt.weights.product import product

Base = Literal["dense", "8bit"]
BASES: tuple[Base, ...] = ("dense", "8bit")


@dataclasses.dataclass(frozen=True)
class LoRA(Weight):
    """y = x W with W = W0 + (alpha / rank) A B: A [d_in, rank], B [rank, d_out], W0 frozen.

    W0 is drawn as a dense matrix would be, or comes from one (``from_dense``, ``growth.Convert``);
    it has no gradient, no optimizer state and no decay. A is uniform on +-1/sqrt(d_in) (Kaiming's,
    as the authors' code has it), and B is 0, so that W is W0 at first. ``growth.ReLoRA`` adds A B
    to W0 every so often.

    With "8bit" W0 is held as codes of a byte and a scale for every 256 entries of a row
    (``int8.py``): the forward and the backward pass each make the matrix of it when they need it.
    """

    factors: ClassVar[tuple[str, ...]] = ("a", "b")

    # columns of A and rows of B; below 1 the share of the matrix's numbers that A and B have
    rank: int | float = 128
    alpha: float = 32.0  # A B is scaled by alpha / rank
    base: Base = "dense"  # how W0 is held

    def __post_init__(self):
        check_rank(self.rank)
        if not self.alpha > 0:
            raise ConfigError("alpha", f"{self.alpha} is not valid; give a number > 0")
        if self.base not in BASES:
            raise ConfigError("base", f"{self.base!r} is not one of {', '.join(BASES)}")

    def build(self, scope, d_in, d_out, axes, init):
        return LoRAModule(self, scope, d_in, d_out, axes, init)

    def flops(self, d_in, d_out):
        return 2 * d_in * d_out + 2 * rank_of(self.rank, d_in, d_out) * (d_in + d_out)

    def frozen_flops(self, d_in, d_out):
        return 2 * d_in * d_out

    def parameters(self, d_in, d_out):
        return rank_of(self.rank, d_in, d_out) * (d_in + d_out)


class LoRAModule(WeightModule):
    def __init__(self, config: LoRA, scope: Scope, d_in: int, d_out: int, axes, init):
        rank = rank_of(config.rank, d_in, d_out)
        self.scale, self.quantised = config.alpha / rank, config.base == "8bit"
        self.a = scope.param("a", (d_in, rank), (axes[0], "rank"), FanInUniform(), fan_in=d_in)
        self.b = scope.param("b", (rank, d_out), ("rank", axes[1]), Constant(0.0), fan_in=rank)
        if not self.quantised:
            self.w = scope.param(
                "w", (d_in, d_out), axes, init, fan_in=d_in, fan_out=d_out, kind=FROZEN
            )
            return

        def draw(key):
            return quantise(init(key, (d_in, d_out), d_in, d_out, jnp.float32))

        self.codes = scope.constant(
            "codes", (d_in, d_out), axes, lambda key: draw(key)[0], "int8", key_of="w"
        )
        # Columns of the scales cannot be cut where those of the matrix can: they are few.
        self.scales = scope.constant(
            "scales",
            (d_in, -(-d_out // BLOCK)),
            (axes[0], None),
            lambda key: draw(key)[1],
            "float32",
            kind=FROZEN,
            key_of="w",
        )

    @property
    def _base(self) -> tuple[jax.Array, ...]:
        return (self.codes[...], self.scales[...]) if self.quantised else (self.w[...],)

    def __call__(self, x: jax.Array) -> jax.Array:
        low = product(product(x, self.a[...]), self.b[...])
        return frozen_product(x, *self._base) + self.scale * low

    def _dense(self) -> jax.Array:
        a, b = (p[...].astype(jnp.float32) for p in (self.a, self.b))
        low = jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
        return _matrix(self._base, jnp.float32) + self.scale * low

    def dense(self) -> jax.Array:
        return self._dense().astype(self.a[...].dtype)

    def from_dense(self, matrix: jax.Array) -> LoRAModule:
        """W0 is the matrix (rounded to the parameters' type, or to 8 bits), and B is 0."""
        nothing = jnp.zeros_like(self.b[...])
        if not self.quantised:
            return replaced(self, w=matrix, b=nothing)
        codes, scales = quantise(matrix)
        return replaced(self, codes=codes, scales=scales, b=nothing)

    def merged(self, key: jax.Array) -> LoRAModule:
        """The same matrix, all of it in W0, with A drawn anew and B zero (Lialin et al. 2023,
        "ReLoRA", algorithm 1).

        W0 takes the sum as it holds numbers: exactly but for the rounding of its type. In bfloat16
        that is up to 1/256 of an entry, and with 8 bits up to 1/254 of the block's largest one;
        what A B had in an entry below half of that is lost.
        """
        a, d_in = self.a[...], self.a[...].shape[0]
        drawn = FanInUniform()(key, a.shape, d_in, a.shape[1], a.dtype)
        return replaced(self.from_dense(self._dense()), a=drawn)


@jax.custom_vjp
def frozen_product(x: jax.Array, *base: jax.Array) -> jax.Array:
    """x [..., d_in] times W0, in x's dtype, with a gradient for x alone.

    Args:
      base: W0 [d_in, d_out], or its codes and their scales.
    """
    if len(base) > 1:  # else the matrices of all layers might be made at once, before they are due
        x, base = jax.lax.optimization_barrier((x, base))
    return jnp.dot(x, _matrix(base, x.dtype))


def _matrix(base: tuple[jax.Array, ...], dtype) -> jax.Array:
    return base[0].astype(dtype) if len(base) == 1 else dequantise(base[0], base[1], dtype)


def _forward(x, *base):
    return frozen_product(x, *base), base


def _backward(base, g):
    # Made of what is at hand now: without the barrier XLA would keep the forward pass's matrix.
    base, g = jax.lax.optimization_barrier((base, g))
    dx = jax.lax.dot_general(g, _matrix(base, g.dtype), (((g.ndim - 1,), (1,)), ((), ())))
    return dx, *(None for _ in base)


frozen_product.defvjp(_forward, _backward)
