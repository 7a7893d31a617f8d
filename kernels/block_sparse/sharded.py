"""The product over a mesh of devices: each multiplies its own tokens with its own blocks.

Where the parts of a matrix (``places.joined``) hold as many blocks each, so does every device, and
the shapes on all of them are the same whatever the support is, and stay so when it changes.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.block_sparse import api
from kernels.block_sparse.places import grid_of, joined

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Split:
    """Mesh axes over which x's first axes are cut, each by its own; W's rows (and x's last axis);
    and W's columns (and y's last axis). None: not at all."""

    lead: tuple[Axes, ...] = ()
    rows: Axes = None
    columns: Axes = None

    def size(self, mesh: Mesh, name: str) -> int:
        axes = getattr(self, name)
        size = 1
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            size *= mesh.shape[axis]
        return size


def sharded_block_sparse(
    x: jax.Array,
    blocks: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    d_out: int,
    *,
    mesh: Mesh,
    split: Split,
    implementation: api.Implementation | None = None,
) -> jax.Array:
    """``block_sparse_matmul`` of a matrix in parts, cut over ``mesh`` as ``split`` says.

    Args:
      x: [..., d_in]. blocks: [gi, gj, m, block_in, block_out]. rows, columns: int32 [gi, gj, m],
        from each part's corner.

    Raises:
      ValueError: parts that the devices do not divide, or a side of the matrix that is cut and no
        multiple of its parts' blocks.
    """
    d_in, block = x.shape[-1], blocks.shape[3:]
    ways = split.size(mesh, "rows"), split.size(mesh, "columns")
    for name, width, side, parts, n in zip(
        ("rows", "columns"), (d_in, d_out), block, rows.shape, ways, strict=False
    ):
        if n > 1 and (parts % n or width % (side * parts)):
            raise ValueError(
                f"{width} {name} in {parts} parts of blocks of {side} cannot be cut over {n} "
                "devices: these must divide the parts, and whole blocks make up each part"
            )
    local_out = d_out // ways[1]

    def local(x, blocks, rows, columns):
        grid = grid_of(x.shape[-1], local_out, block)
        parts = joined(blocks, rows, columns, grid)
        y = api.block_sparse_matmul(x, *parts, local_out, implementation=implementation)
        return y if ways[0] == 1 else jax.lax.psum(y, split.rows)

    lead = (*split.lead, *[None] * (x.ndim - 1 - len(split.lead)))
    of_parts = P(split.rows, split.columns)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(*lead, split.rows), of_parts, of_parts, of_parts),
        out_specs=P(*lead, split.columns),
        check_vma=False,  # kernels do not say over what their results vary
    )(x, blocks, rows, columns)
