"""Rows of a table, and the table's gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpt.gather import gathered
from jaxpt.mesh import Layout, active_layout
from kernels.platform import platform

CHUNK = 32  # sorted rows that are added up each with each


def embedded(table: jax.Array, ids: jax.Array, dtype) -> jax.Array:
    """``table`` [V, D], of logical axes (vocab, embed), at ``ids`` [B, T]: [B, T, D] in ``dtype``.

    Where the width is cut over devices that rows of the batch are cut over, either the table is
    gathered and its gradient's parts are scattered, or, where a device has fewer tokens than the
    table has rows, each looks up all their tokens in its own columns, and the rows are handed
    round: less is sent, and no device holds a table or a gradient that is whole.
    """
    layout = active_layout()
    found = None if layout is None else cut_of(table.shape, ids.shape, layout)
    if found is not None:
        return _handed_round(found, jnp.dtype(dtype), table, ids)
    # Gathered first: looked up in a table cut along the width, XLA would cut the rows anew.
    table = gathered(table, ("vocab", "embed"), ("vocab", "width"))
    return lookup(table, ids).astype(dtype)


class Cut(NamedTuple):
    """How a lookup is cut over a mesh: axes of the mesh along each dimension."""

    mesh: Any
    vocab: tuple[str, ...]
    width: tuple[str, ...]
    batch: tuple[str, ...]
    length: tuple[str, ...]

    @property
    def table(self) -> PartitionSpec:
        return PartitionSpec(self.vocab or None, self.width)

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(self.batch, self.length or None)

    @property
    def rows(self) -> PartitionSpec:
        return PartitionSpec(self.batch, self.length or None, None)

    def whole(self, ids_bt: jax.Array) -> jax.Array:
        """Ids of all devices that share a row's columns."""
        return jax.lax.all_gather(ids_bt, self.width, tiled=True)

    def own(self, ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        """Ids as numbers of a device's own ``rows`` rows, and whether they are any."""
        first = jax.lax.axis_index(self.vocab) * rows if self.vocab else 0
        return ids - first, (ids >= first) & (ids < first + rows)


def cut_of(table: Sequence[int], ids: Sequence[int], layout: Layout) -> Cut | None:
    """How a lookup of ids of this shape in a table of that shape is cut; None where the table is
    better gathered, or nothing is cut."""
    specs = (*layout.spec(("vocab", "embed")), *layout.spec(("batch", "length")))
    vocab, width, batch, length = (
        (names,) if isinstance(names, str) else tuple(names or ()) for names in specs
    )

    def ways(names):
        return math.prod(layout.mesh.shape[name] for name in names)

    sizes = zip((*table, *ids), (vocab, width, batch, length), strict=True)
    if (
        not width
        or not set(width) <= set(batch)
        or any(size % ways(names) for size, names in sizes)
    ):
        return None
    if math.prod(ids) // ways(batch + length) > table[0] // ways(vocab):
        return None
    return Cut(layout.mesh, vocab, width, batch, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _handed_round(cut: Cut, dtype, table, ids):
    def local(table_vd, ids_bt):
        ids_Bt, inside = cut.own(cut.whole(ids_bt), len(table_vd))
        rows = jnp.take(table_vd, ids_Bt, axis=0, mode="clip" if cut.vocab else None).astype(dtype)
        if cut.vocab:
            rows = jax.lax.psum(jnp.where(inside[..., None], rows, 0), cut.vocab)
        return jax.lax.all_to_all(rows, cut.width, 0, 2, tiled=True)

    return _on(cut, local, (cut.table, cut.tokens), cut.rows)(table, ids)


def _handed_round_forward(cut, dtype, table, ids):
    return _handed_round(cut, dtype, table, ids), (table[:, :0], ids)


def _handed_round_backward(cut, dtype, saved, g):
    column, ids = saved
    others = tuple(n for n in cut.batch + cut.length if n not in cut.width)
    rows = column.shape[0] // math.prod(cut.mesh.shape[n] for n in cut.vocab)

    def local(g_btD, ids_bt):
        g_Btd = jax.lax.all_to_all(g_btD, cut.width, 2, 0, tiled=True)
        ids_Bt, inside = cut.own(cut.whole(ids_bt), rows)
        ids_Bt = jnp.where(inside, ids_Bt, rows)  # that of no row
        total = _added(g_Btd.astype(column.dtype), ids_Bt, rows)
        return jax.lax.psum(total, others) if others else total

    return _on(cut, local, (cut.rows, cut.tokens), cut.table)(g, ids), None


_handed_round.defvjp(_handed_round_forward, _handed_round_backward)


def _on(cut: Cut, local, given, made):
    return jax.shard_map(local, mesh=cut.mesh, in_specs=given, out_specs=made, check_vma=False)


@jax.custom_vjp
def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table`` [V, D] at ``ids`` (int, of any shape): [..., D]."""
    return jnp.take(table, ids, axis=0)


def _forward(table, ids):
    # An empty column tells the backward pass how many rows there are, and of which type.
    return lookup(table, ids), (table[:, :0], ids)


def _backward(saved, g):
    column, ids = saved
    rows, g = column.shape[0], g.astype(column.dtype)
    if platform() == "gpu":
        return _summed_over_devices(g, ids, rows), None
    return _added(g, ids, rows), None


lookup.defvjp(_forward, _backward)


def _added(g: jax.Array, ids: jax.Array, rows: int) -> jax.Array:
    """Row v of the result is the sum of those of ``g`` [..., D] whose id is v; on one device."""
    if platform() == "gpu":
        return _summed_flat(g, ids, rows)
    # The zeros that the rows are added to hang on what is added: else XLA makes them, as large as
    # the table, whenever it likes, and keeps them through the layers' backward pass.
    zero, g = jax.lax.optimization_barrier((jnp.zeros([], g.dtype), g))
    return jnp.broadcast_to(zero, (rows, g.shape[-1])).at[ids].add(g)


def _summed_over_devices(g: jax.Array, ids: jax.Array, rows: int) -> jax.Array:
    """``summed`` of each device's own tokens, added up."""
    local = functools.partial(_summed_flat, rows=rows)
    layout = active_layout()
    if layout is None or layout.mesh.size == 1:
        return local(g, ids)
    tokens = layout.spec(("batch", "length")[: ids.ndim], ids.shape)
    names = [n for axis in tokens if axis for n in ((axis,) if isinstance(axis, str) else axis)]
    return jax.shard_map(
        lambda g, ids: jax.lax.psum(local(g, ids), tuple(names)),
        mesh=layout.mesh,
        in_specs=(tokens, tokens),
        out_specs=PartitionSpec(),
    )(g, ids)


def _summed_flat(g: jax.Array, ids: jax.Array, rows: int) -> jax.Array:
    return summed(g.reshape(-1, g.shape[-1]), ids.reshape(-1), rows)


def summed(g: jax.Array, ids: jax.Array, rows: int) -> jax.Array:
    """Row v of the result is the sum of the rows of ``g`` whose id is v: what ``.at[ids].add``
    does, by sorting and reading.

    A scatter whose indices repeat is a loop of compare-and-swap on GPUs for bfloat16, and for
    float32 too as jaxlib 0.10.2 and 0.11.0 compile it: hundreds of times slower where many tokens
    are the same (openxla/xla#46225).

    Args:
      g: [N, D].
      ids: int [N]; those that are no row's are left out.
      rows: V.

    Returns:
      [V, D], of g's dtype; summed in float32.
    """
    order = jnp.argsort(ids)
    pad = -len(ids) % CHUNK
    ids_MC = jnp.pad(ids[order], (0, pad), constant_values=rows).reshape(-1, CHUNK)
    g_MCD = jnp.pad(g[order], ((0, pad), (0, 0))).reshape(*ids_MC.shape, -1)
    # Within a chunk of sorted rows the sum of each run of equal ids. (No product of matrices: for
    # those XLA reserves work space on GPUs.)
    begins = jnp.pad(ids_MC[:, 1:] != ids_MC[:, :-1], ((0, 0), (1, 0)))
    run_MC = jnp.cumsum(begins, axis=1)
    member = run_MC[:, None] == jnp.arange(CHUNK)[:, None]
    wide = g_MCD[:, None].astype(jnp.float32)
    sums_MCD = jnp.sum(jnp.where(member[..., None], wide, 0), axis=2)
    # The last run of a chunk may go on in the next, and, where that is all of one id, further:
    # what follows chunk m is  tail[m] = first[m + 1] + through[m + 1] tail[m + 1].
    goes_on = jnp.pad(ids_MC[1:, 0] == ids_MC[:-1, -1], (1, 0))
    through = goes_on & (run_MC[:, -1] == 0)
    first = jnp.where(goes_on[:, None], sums_MCD[:, 0], 0)
    _, back = jax.lax.associative_scan(_chained, (through[:, None], first), reverse=True)
    tail = jnp.pad(back[1:], ((0, 1), (0, 0)))
    last = (jnp.arange(CHUNK) == run_MC[:, -1:])[..., None]
    sums = (sums_MCD + jnp.where(last, tail[:, None], 0)).reshape(-1, g.shape[-1]).astype(g.dtype)
    # A row's first run lies where its id would be put; there is none where another's id stands.
    flat, own = ids_MC.reshape(-1), jnp.arange(rows)
    place = jnp.minimum(jnp.searchsorted(flat, own), len(flat) - 1)
    at = place - place % CHUNK + run_MC.reshape(-1)[place]
    return jnp.where((flat[place] == own)[:, None], sums[at], 0)


def _chained(later, earlier):
    """One stretch of chunks before another: (whether what follows both goes through, their sum)."""
    (through_1, sum_1), (through_2, sum_2) = later, earlier
    return through_1 & through_2, sum_2 + jnp.where(through_2, sum_1, 0)
