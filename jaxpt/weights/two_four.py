"""2:4 sparsity, held in half the numbers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.weights.base import Scope, replaced
from jaxpt.weights.init import Init
from jaxpt.weights.patterns import Groups
from jaxpt.weights.product import product
from jaxpt.weights.sparse import Sparse, SparseModule

PATTERN = Groups(4)


@dataclasses.dataclass(frozen=True)
class TwoFour(Sparse):
    """y = x W, of which two of every four consecutive inputs of an output are held: their numbers,
    [d_in / 2, d_out], and two bits for the place of each, [d_in / 8, d_out] bytes.

    W is made from them when it is multiplied by, in the forward and again in the backward pass, and
    its gradient is made and read off where numbers are held. So there are half of a dense matrix's
    numbers and moments, and a bit for each entry: in bfloat16 9/16 of its bytes, in float32 17/32.
    The time is that of the dense product and of making W. ``jaxpt.sparsity`` may exchange places
    (SET, RigL).

    No faster: GPUs from Ampere on multiply 2:4 by dense matrices at up to twice the rate, but JAX
    (0.10.2) lets a program say so on one generation alone. Neither XLA's dot nor Pallas's Triton
    lowering takes such an operand (jax-ml/jax#19212 and triton-lang/triton#6891 are open); Mosaic
    GPU has it for Blackwell's ``tcgen05_mma`` (``a_sparse_metadata``) and not for Hopper's
    ``wgmma``. It would serve y = x W and, as the pattern lies along inputs alone, not dx = dy W^T.
    TPUs have no such unit.
    """

    fixed: ClassVar[bool] = True
    held: ClassVar[tuple[str, ...]] = ("values",)
    cost: ClassVar[str | None] = (
        "smaller, not faster: half the numbers, gradients and moments, in the dense product's time "
        "and that of making the matrix twice a step; it breaks even at no density"
    )

    density: float = 0.5  # of 2:4; no other
    pattern: Groups = PATTERN  # of four; no other

    def __post_init__(self):
        if (self.density, self.pattern) != (0.5, PATTERN):
            raise ConfigError("density", "2:4 is a half of groups of four; give neither")

    def build(self, scope, d_in, d_out, axes, init):
        self.check(scope, d_in, d_out)
        return TwoFourModule(scope, d_in, d_out, axes, init)

    def flops(self, d_in, d_out):
        """Of the dense product that is made."""
        return 2 * d_in * d_out

    def parameters(self, d_in, d_out):
        return d_in * d_out // 2


class TwoFourModule(SparseModule):
    """values: [d_in / 2, d_out], two of each group, the earlier one first. indices: uint8
    [ceil(d_in / 8), d_out], two bits each: of group 2 i in the lower half of byte i, of group
    2 i + 1 in the upper one, the earlier place in the lower two bits."""

    def __init__(self, scope: Scope, d_in: int, d_out: int, axes, init: Init):
        half = (d_in // 2, d_out)
        self.values = scope.param("values", half, axes, init, fan_in=d_in, fan_out=d_out)
        self.indices = scope.constant(
            "indices",
            (-(-d_in // 8), d_out),
            axes,
            lambda key: pack(places_of(PATTERN.draw(key, 2, d_in, d_out))),
            "uint8",
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        # Made again in the backward pass: no W lives between the two.
        formed = jax.checkpoint(lambda x, values, indices: product(x, dense(values, indices)))
        return formed(x, self.values[...].astype(x.dtype), self.indices[...])

    def dense(self) -> jax.Array:
        return dense(self.values[...], self.indices[...])

    def from_dense(self, matrix: jax.Array) -> TwoFourModule:
        """The nearest: the two largest of each group."""
        size = jnp.abs(PATTERN.mean(matrix).astype(jnp.float32))
        places = places_of(PATTERN.top(size, 2))
        return replaced(self, values=gather(matrix, places), indices=pack(places))

    def support(self) -> jax.Array:
        places = unpack(self.indices[...], len(self.values[...]) // 2)
        return (places[:, :, None] == jnp.arange(4)[:, None]).any(1)

    def places(self, support: jax.Array) -> dict[str, jax.Array]:
        return {"indices": pack(places_of(support))}

    def carry(self, array: jax.Array, support: jax.Array) -> jax.Array:
        return gather(dense(array, self.indices[...]), places_of(support))

    def entries(self) -> jax.Array:
        return jnp.float32(self.values[...].size)


def places_of(support: jax.Array) -> jax.Array:
    """int32 [groups, 2, d_out]: where the two of each group are, given bool [groups, 4, d_out]."""
    order = jnp.argsort(~support, axis=1, stable=True)
    return order[:, :2].astype(jnp.int32)


def pack(places: jax.Array) -> jax.Array:
    """uint8 [ceil(groups / 2), d_out] from int32 [groups, 2, d_out]; see ``TwoFourModule``."""
    nibbles = places[:, 0] | (places[:, 1] << 2)
    nibbles = jnp.pad(nibbles, ((0, len(nibbles) % 2), (0, 0)))
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(jnp.uint8)


def unpack(packed: jax.Array, groups: int) -> jax.Array:
    """Inverts ``pack``: int32 [groups, 2, d_out]."""
    shifts = jnp.array([0, 2, 4, 6], jnp.uint8)[:, None]
    places = (packed[:, None] >> shifts) & 3
    return places.reshape(-1, 2, packed.shape[1])[:groups].astype(jnp.int32)


def dense(values: jax.Array, indices: jax.Array) -> jax.Array:
    """W [d_in, d_out] from values [d_in / 2, d_out] and their packed places."""
    half, d_out = values.shape
    places = unpack(indices, half // 2)[:, :, None]
    here = places == jnp.arange(4)[:, None]
    held = jnp.where(here, values.reshape(half // 2, 2, 1, d_out), 0)
    return (held[:, 0] + held[:, 1]).reshape(2 * half, d_out)


def gather(matrix: jax.Array, places: jax.Array) -> jax.Array:
    """What is at the places of a matrix [d_in, d_out]: [d_in / 2, d_out]."""
    return jnp.take_along_axis(PATTERN.mean(matrix), places, axis=1).reshape(-1, matrix.shape[1])
