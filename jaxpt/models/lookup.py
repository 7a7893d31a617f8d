"""Rows of a table, and the table's gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpt.mesh import active_layout
from kernels.platform import platform

CHUNK = 32  # sorted rows that are added up each with each


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
    # The zeros that the rows are added to hang on what is added: else XLA makes them, as large as
    # the table, whenever it likes, and keeps them through the layers' backward pass.
    zero, g = jax.lax.optimization_barrier((jnp.zeros([], column.dtype), g))
    return jnp.broadcast_to(zero, (rows, g.shape[-1])).at[ids].add(g), None


lookup.defvjp(_forward, _backward)


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
