"""Matrices of which some blocks are held, and the rest are zero: less memory and less work."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.mesh import active_layout
from jaxpt.weights.base import Scope, Weight, replaced
from jaxpt.weights.init import Constant, FanInUniform, Init
from jaxpt.weights.low_rank import check_rank, factors, rank_of
from jaxpt.weights.patterns import Blocks, Pattern
from jaxpt.weights.product import product
from jaxpt.weights.sparse import Sparse, SparseModule
from kernels import block_sparse as kernel

ROUNDS = 12  # alternating projections of ``LowRankPlusBlockSparse.from_dense``
COST = (
    "faster where few blocks are held, and smaller: time, numbers, gradients and moments are those "
    "of the blocks. Breaks even with the dense product at a density of 0.56 to 0.75 on CPUs "
    "(kernels/README.md); on GPUs and TPUs not measured"
)


@dataclasses.dataclass(frozen=True)
class BlocksInParts(Pattern):
    """Blocks of ``rows`` x ``columns`` entries that compete within equal parts of their matrix, so
    that each holds as many: what a mesh can cut (a part or more to a device), and work that is
    evenly spread.

    0 parts are as many as there are rows (columns) of blocks: ``outputs=0`` balances each column.
    """

    rows: int = 128  # inputs of a block
    columns: int = 128  # outputs of a block
    inputs: int = 1  # into how many parts the rows of blocks are cut; 0: each is one
    outputs: int = 0  # into how many parts the columns of blocks are cut; 0: each is one

    def __post_init__(self):
        Blocks(self.rows, self.columns)
        for name in ("inputs", "outputs"):
            if getattr(self, name) < 0:
                raise ConfigError(name, f"{getattr(self, name)} is not valid; give 0 or more")

    def grid(self, d_in, d_out):
        high, wide = Blocks(self.rows, self.columns).grid(d_in, d_out)
        parts = self.inputs or high, self.outputs or wide
        for name, all_, n in zip(("inputs", "outputs"), (high, wide), parts, strict=True):
            if all_ % n:
                raise ConfigError(name, f"{n} parts do not divide {all_} blocks")
        return *parts, high // parts[0], wide // parts[1]

    def mean(self, matrix):
        means = Blocks(self.rows, self.columns).mean(matrix)
        gi, gj, high, wide = self.grid(*matrix.shape[-2:])
        return means.reshape(*means.shape[:-2], gi, high, gj, wide).swapaxes(-3, -2)

    def spread(self, units, d_in, d_out):
        gi, gj, high, wide = units.shape[-4:]
        whole = units.swapaxes(-3, -2).reshape(*units.shape[:-4], gi * high, gj * wide)
        return Blocks(self.rows, self.columns).spread(whole, d_in, d_out)


@dataclasses.dataclass(frozen=True)
class BlockSparse(Sparse):
    """y = x W, of whose blocks exactly ``pattern.count(density)`` are held in each competition.

    What is not held takes no memory and no work: neither in W, nor in its gradient, nor in its
    optimizer's state. At the start blocks are drawn at random, and their entries as a dense
    matrix's; ``jaxpt.sparsity`` may exchange blocks (SET, RigL), as many as before, the gradient of
    all entries made at those steps alone.

    ``Blocks(rows, columns)`` competes over the whole matrix: one device holds all of it.
    ``BlocksInParts`` holds as many in each part: that is what a mesh can cut. A matrix whose sides
    are no multiples of the block's has smaller blocks at its edges, held as whole ones.

    Blocks of 128 are what matrix units like (on TPUs smaller ones go to XLA), smaller ones what
    the choice of them likes.
    """

    fixed: ClassVar[bool] = True
    held: ClassVar[tuple[str, ...]] = ("blocks",)
    cost: ClassVar[str | None] = COST

    density: float = 0.25  # share of the blocks that are held
    pattern: Blocks | BlocksInParts = Blocks(128, 128)  # their size, and where they compete

    def build(self, scope, d_in, d_out, axes, init):
        self.check(scope, d_in, d_out)
        return BlockSparseModule(self, scope, d_in, d_out, axes, init)

    def flops(self, d_in, d_out):
        return 2 * self.parameters(d_in, d_out)

    def parameters(self, d_in, d_out):
        """Numbers of the blocks that are held, those beyond the matrix's edge too."""
        pattern = self.pattern
        held = self.count(d_in, d_out) * pattern.competitions(d_in, d_out)
        return held * pattern.rows * pattern.columns


@dataclasses.dataclass(frozen=True)
class LowRankPlusBlockSparse(Weight):
    """y = (alpha / rank) (x A) B + x S: A [d_in, rank], B [rank, d_out], S of blocks.

    SLTrain (Han et al. 2024) with blocks for its support: W is never formed, in neither pass, so
    that the work falls with the parameters. (Whether it learns as well as with single entries is
    what ``experiments/block_sparse_sltrain.py`` asks.) The support is drawn once and stays. At the
    start B is 0, A uniform on +-1/sqrt(d_in) and S's entries uniform on +-1/sqrt(d_in), as in
    ``SparsePlusLowRank``.
    """

    factors: ClassVar[tuple[str, ...]] = ("a", "b")
    cost: ClassVar[str | None] = (
        "faster and smaller: three products with thin matrices and with the blocks that are held. "
        "At rank d / 4 and a density of 1/32 it takes 0.8 of the dense product's time on CPUs "
        "(kernels/README.md); on GPUs and TPUs not measured"
    )

    rank: int = 128  # columns of A and rows of B
    alpha: float = 16.0  # A B is scaled by alpha / rank
    density: float = 0.03  # share of S's blocks that are held
    pattern: Blocks | BlocksInParts = Blocks(32, 32)  # their size, and where they compete

    def __post_init__(self):
        check_rank(self.rank)
        if not self.alpha > 0:
            raise ConfigError("alpha", f"{self.alpha} is not valid; give a number > 0")
        BlockSparse(self.density, self.pattern)

    @property
    def sparse(self) -> BlockSparse:
        """How S is held."""
        return BlockSparse(self.density, self.pattern)

    def build(self, scope, d_in, d_out, axes, init):
        self.sparse.check(scope, d_in, d_out)
        return LowRankPlusBlockSparseModule(self, scope, d_in, d_out, axes)

    def flops(self, d_in, d_out):
        return 2 * self.parameters(d_in, d_out)

    def parameters(self, d_in, d_out):
        low = rank_of(self.rank, d_in, d_out) * (d_in + d_out)
        return low + self.sparse.parameters(d_in, d_out)


class HeldBlocks(SparseModule):
    """What both modules share.

    blocks: [gi, gj, m, rows, columns], of the matrix's gi x gj parts (1 x 1 for ``Blocks``) with m
      blocks each; within a part column by column, from the top.
    rows, columns: int32 [gi, gj, m], where they lie in their part.
    """

    def hold(self, config: BlockSparse, scope: Scope, shape, axes, init: Init, kind=None) -> None:
        """Makes the parameters of a matrix of this shape."""
        pattern, (d_in, d_out) = config.pattern, shape
        self.pattern, self.shape, self.axes = pattern, shape, axes
        self.parts: tuple[int, ...] = (1, 1, *pattern.grid(d_in, d_out))[-4:]
        held = (*self.parts[:2], config.count(d_in, d_out))
        # A side that is one part is not cut.
        places = tuple(a if n > 1 else None for a, n in zip(axes, held, strict=False))
        self.blocks = scope.param(
            "blocks",
            (*held, pattern.rows, pattern.columns),
            (*places, None, None, None),
            init,
            fan_in=d_in,
            fan_out=d_out,
            kind=kind,
        )

        def place(name: str, which: int):
            def draw(key):
                return self._places(pattern.draw(key, held[-1], d_in, d_out), held[-1])[which]

            return scope.constant(name, held, (*places, None), draw, "int32", key_of="support")

        self.rows, self.columns = place("rows", 0), place("columns", 1)

    def _flat(self, support: jax.Array) -> jax.Array:
        """bool [gi, gj, units of a part], column by column."""
        gi, gj, high, wide = self.parts
        return support.reshape(self.parts).swapaxes(2, 3).reshape(gi, gj, wide * high)

    def _places(self, support: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        at = jnp.argsort(~self._flat(support), axis=-1, stable=True)[..., :count]
        high = self.parts[2]
        return (at % high).astype(jnp.int32), (at // high).astype(jnp.int32)

    def places(self, support: jax.Array) -> dict[str, jax.Array]:
        places = self._places(support, self.rows.shape[-1])
        return dict(zip(("rows", "columns"), places, strict=True))

    def support(self) -> jax.Array:
        gi, gj, high, wide = self.parts
        number = (self.columns[...] * high + self.rows[...]).reshape(gi * gj, -1)

        def one(number):
            return (
                jnp.zeros(high * wide, bool)
                .at[number]
                .set(True, unique_indices=True, indices_are_sorted=True)
            )

        flat = jax.vmap(one)(number).reshape(gi, gj, wide, high)
        return flat.swapaxes(2, 3).reshape(self.pattern.grid(*self.shape))

    def carry(self, array: jax.Array, support: jax.Array) -> jax.Array:
        before = self._flat(self.support())
        rows, columns = self._places(support, self.rows.shape[-1])
        at = columns * self.parts[2] + rows
        stays = jnp.take_along_axis(before, at, axis=2)
        slot = jnp.take_along_axis(jnp.cumsum(before, axis=2) - 1, at, axis=2)
        moved = jnp.take_along_axis(array, jnp.maximum(slot, 0)[..., None, None], axis=2)
        return jnp.where(stays[..., None, None], moved, jnp.zeros((), array.dtype))

    def entries(self) -> jax.Array:
        widths = self.pattern.rows, self.pattern.columns
        _, rows, columns = self._joined()
        sizes = [
            jnp.minimum(width, size - width * at)
            for width, size, at in zip(widths, self.shape, (rows, columns), strict=True)
        ]
        return jnp.sum((sizes[0] * sizes[1]).astype(jnp.float32))

    def _joined(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self._join(self.rows[...], self.columns[...])

    def _join(self, rows: jax.Array, columns: jax.Array):
        gi, gj, high, wide = self.parts
        return kernel.joined(self.blocks[...], rows, columns, (gi * high, gj * wide))

    def sparse(self) -> jax.Array:
        """S, with its zeros."""
        return kernel.spread(*self._joined(), *self.shape)

    def strongest(self, matrix: jax.Array) -> dict[str, jax.Array]:
        """The parameters that hold the blocks of ``matrix`` of the greatest norms."""
        block, count = (self.pattern.rows, self.pattern.columns), self.rows.shape[-1]
        gi, gj, high, wide = self.parts
        norms = kernel.norms(matrix, block).reshape(gi, high, gj, wide).swapaxes(1, 2)
        support = self.pattern.top(norms.reshape(self.pattern.grid(*self.shape)), count)
        places = self.places(support)
        _, rows, columns = self._join(**places)
        blocks = kernel.gather(matrix, rows, columns, block).reshape(self.blocks.shape)
        return places | {"blocks": blocks}

    def times(self, x: jax.Array) -> jax.Array:
        """x S, cut over the active layout: each device with its own tokens and parts."""
        layout, d_out = active_layout(), self.shape[1]
        if layout is None or layout.mesh.size == 1:
            return kernel.block_sparse_matmul(x, *self._joined(), d_out)
        lead = ("batch", "length")[: x.ndim - 1]
        sides = (
            "width" if axis == "embed" or n == 1 else axis
            for axis, n in zip(self.axes, self.parts, strict=False)
        )
        rows, columns = layout.spec(tuple(sides))
        cut = layout.spec(lead)
        split = kernel.Split(
            tuple(
                a if a is None or size % layout.ways(name) == 0 else None
                for a, name, size in zip(cut, lead, x.shape, strict=False)
            ),
            rows,
            columns,
        )
        return kernel.sharded_block_sparse(
            x,
            self.blocks[...],
            self.rows[...],
            self.columns[...],
            d_out,
            mesh=layout.mesh,
            split=split,
        )


class BlockSparseModule(HeldBlocks):
    def __init__(self, config: BlockSparse, scope: Scope, d_in: int, d_out: int, axes, init: Init):
        self.hold(config, scope, (d_in, d_out), axes, init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.times(x)

    def dense(self) -> jax.Array:
        return self.sparse()

    def from_dense(self, matrix: jax.Array) -> BlockSparseModule:
        """The nearest of its density: the blocks of the greatest norms."""
        return replaced(self, **self.strongest(matrix))


class LowRankPlusBlockSparseModule(HeldBlocks):
    """a: [d_in, rank]. b: [rank, d_out]. The rest is S."""

    def __init__(self, config: LowRankPlusBlockSparse, scope: Scope, d_in: int, d_out: int, axes):
        rank = rank_of(config.rank, d_in, d_out)
        self.scale, kaiming = config.alpha / rank, FanInUniform()
        self.a = scope.param("a", (d_in, rank), (axes[0], "rank"), kaiming, fan_in=d_in)
        self.b = scope.param("b", (rank, d_out), ("rank", axes[1]), Constant(0.0), fan_in=rank)
        self.hold(config.sparse, scope, (d_in, d_out), axes, kaiming, kind="sparse")

    def __call__(self, x: jax.Array) -> jax.Array:
        low = product(product(x, self.a[...]), self.b[...])
        return low * jnp.asarray(self.scale, x.dtype) + self.times(x)

    def dense(self) -> jax.Array:
        low = self.a[...] @ self.b[...]
        return self.scale * low + self.sparse()

    def from_dense(self, matrix: jax.Array) -> LowRankPlusBlockSparseModule:
        """Nearly the nearest: S, of the strongest blocks, and A B take the rest of one another in
        turn (Zhou and Tao 2011, "GoDec", algorithm 1, with blocks for entries)."""
        matrix, rank = matrix.astype(jnp.float32), self.a.shape[1]

        def with_blocks(**held) -> Any:
            return replaced(self, **held)

        def round_(_, carry):
            held = carry[0]
            a, b = factors(matrix - with_blocks(**held).sparse(), rank)
            return self.strongest(matrix - a @ b), a, b

        a, b = factors(matrix, rank)
        start = (self.strongest(matrix - a @ b), a, b)
        held, a, b = jax.lax.fori_loop(0, ROUNDS, round_, start)
        return replaced(self, a=a / self.scale, b=b, **held)
