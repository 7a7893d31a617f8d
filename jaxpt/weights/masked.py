"""A full matrix with a mask: any pattern of sparsity, at the cost of a dense matrix."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.weights.base import Scope, replaced
from jaxpt.weights.init import Constant
from jaxpt.weights.product import product
from jaxpt.weights.sparse import Sparse, SparseModule

Trains = Literal["held", "all", "scores"]
TRAINS: tuple[Trains, ...] = ("held", "all", "scores")


@dataclasses.dataclass(frozen=True)
class Masked(Sparse):
    """y = x (W * M), W [d_in, d_out] and M a mask of bits, which costs 1/8 byte an entry.

    The mask holds exactly ``pattern.count(density)`` units of each competition, drawn at random;
    from there on ``jaxpt.sparsity`` may change it. By what ``trains`` says:

        held     entries that are held have a gradient, all others have none: W and its moments
                 are exactly 0 there. (With optimizers that mix entries, as Muon or GaLore do,
                 numbers may come to stand there, which nothing reads.)
        all      all entries have the gradient of W * M, straight through the mask; those that are
                 not held keep their numbers (``sparsity.StraightThrough``)
        scores   as "held", but that the others keep their numbers; every unit has a score S, of
                 gradient sum(dL/d(W * M) * W) over the unit, held or not (Sanh et al. 2020,
                 "Movement Pruning", section 3; ``sparsity.Movement``)

    Dense in disguise: products, gradients and moments are those of dense matrices, in time and in
    memory. What it saves, it saves where it is exported to.
    """

    cost: ClassVar[str] = (
        "dense in disguise: the time and memory of dense matrices, and 1/8 byte an entry for a mask"
    )

    trains: Trains = "held"  # what has a gradient: see above

    def __post_init__(self):
        super().__post_init__()
        if self.trains not in TRAINS:
            raise ConfigError("trains", f"{self.trains!r} is not one of {', '.join(TRAINS)}")

    @property
    def keeps(self):
        return self.trains != "held"

    def build(self, scope, d_in, d_out, axes, init):
        self.check(scope, d_in, d_out)
        return MaskedModule(self, scope, d_in, d_out, axes, init)

    def flops(self, d_in, d_out):
        """Of the dense product that is made."""
        return 2 * d_in * d_out

    def parameters(self, d_in, d_out):
        """Of W, whatever the mask, and the scores."""
        scores = self.pattern.competing(d_in, d_out) * self.pattern.competitions(d_in, d_out)
        return d_in * d_out + (scores if self.trains == "scores" else 0)


class MaskedModule(SparseModule):
    """w: [d_in, d_out]. mask: uint8, eight rows (or columns) of M a byte. scores: [*grid]."""

    def __init__(self, config: Masked, scope: Scope, d_in: int, d_out: int, axes, init):
        self.config, self.shape = config, (d_in, d_out)
        pattern, count = config.pattern, config.count(d_in, d_out)
        self.axis = packing_axis(d_in, d_out)
        packed = [d_in, d_out]
        packed[self.axis] = -(-packed[self.axis] // 8)

        def draw(key):
            if config.density == 1:
                return self._packed(jnp.ones(pattern.grid(d_in, d_out), bool))
            return self._packed(pattern.draw(key, count, d_in, d_out))

        self.w = scope.param("w", (d_in, d_out), axes, init, fan_in=d_in, fan_out=d_out)
        self.mask = scope.constant(
            "mask",
            tuple(packed),
            axes,
            draw,
            "uint8",
            kind="mask",
        )
        if config.trains == "scores":
            grid = pattern.grid(d_in, d_out)
            self.scores = scope.param(
                "scores", grid, (None,) * len(grid), Constant(0.0), kind="sparse"
            )
        elif config.trains == "held" and config.density < 1:
            # Not before the mask is there, which says what of it stays.
            self.w = type(self.w)(jnp.where(self._mask(), self.w[...], 0))

    def _packed(self, support: jax.Array) -> jax.Array:
        return pack(self.config.pattern.spread(support, *self.shape), self.axis)

    def _mask(self) -> jax.Array:
        return unpack(self.mask[...], self.axis, self.shape[self.axis])

    def __call__(self, x: jax.Array) -> jax.Array:
        w, stop = self.w[...], jax.lax.stop_gradient
        masked = jnp.where(self._mask(), w, 0)
        if self.config.trains == "all":
            masked = w + stop(masked - w)
        elif self.config.trains == "scores":
            scores = self.scores[...]
            nothing = self.config.pattern.spread(scores - stop(scores), *self.shape)
            masked = masked + nothing.astype(w.dtype) * stop(w)
        return product(x, masked)

    def dense(self) -> jax.Array:
        return jnp.where(self._mask(), self.w[...], 0)

    def from_dense(self, matrix: jax.Array) -> MaskedModule:
        """With its own mask."""
        if self.config.keeps:
            return replaced(self, w=matrix)
        return replaced(self, w=jnp.where(self._mask(), matrix, 0))

    def numbers(self) -> jax.Array:
        return self.w[...] if self.config.keeps else self.dense()

    def support(self) -> jax.Array:
        # All entries of a unit are held or none: the mean is 0 or 1.
        return self.config.pattern.mean(self._mask().astype(jnp.float32)) > 0

    def places(self, support: jax.Array) -> dict[str, jax.Array]:
        return {"mask": self._packed(support)}

    def carry(self, array: jax.Array, support: jax.Array) -> jax.Array:
        if self.config.keeps:
            return array
        stay = self._mask() & self.config.pattern.spread(support, *self.shape)
        return jnp.where(stay, array, jnp.zeros((), array.dtype))

    def entries(self) -> jax.Array:
        return jnp.sum(jax.lax.population_count(self.mask[...]).astype(jnp.float32))


def packing_axis(d_in: int, d_out: int) -> int:
    """Along which axis of a matrix its mask's bits are packed: the one whose size has more factors
    of 2, so that meshes that divide the matrix divide the bytes; rows, of which a TPU has eight in
    a tile, where they are equal."""
    return 1 if (d_out & -d_out) > (d_in & -d_in) else 0


def pack(mask: jax.Array, axis: int) -> jax.Array:
    """bool [d_in, d_out] -> uint8: bit i of byte j along ``axis`` is entry 8 j + i, 0 where there
    is none."""
    size = mask.shape[axis]
    more = [(0, -size % 8) if i == axis else (0, 0) for i in range(2)]
    bits = jnp.pad(mask, more).astype(jnp.uint8)
    shape = list(bits.shape)
    shape[axis : axis + 1] = [-(-size // 8), 8]
    bits = bits.reshape(shape) << _bits(axis)
    return jnp.sum(bits, axis=axis + 1, dtype=jnp.uint8)


def unpack(packed: jax.Array, axis: int, size: int) -> jax.Array:
    """The mask, ``size`` long along ``axis``: inverts ``pack``."""
    bits = jnp.expand_dims(packed, axis + 1) & (jnp.uint8(1) << _bits(axis))
    shape = list(packed.shape)
    shape[axis] *= 8
    return jax.lax.slice_in_dim(bits.reshape(shape) != 0, 0, size, axis=axis)


def _bits(axis: int) -> jax.Array:
    """0 to 7 along the axis after ``axis``, of three."""
    return jnp.arange(8, dtype=jnp.uint8).reshape([8 if i == axis + 1 else 1 for i in range(3)])
