"""What the forward and the backward TPU kernel share: the mask and the bias of a block.

Scores are held in units of log2 (``exp2`` is one instruction), so scale and bias carry a factor
log2(e). A bias of distance is constant along diagonals: a block of it is made of 128 x 128 tiles,
of which there are few, because beyond ``max_distance`` all are alike. They are laid out once for
each head, from a strip of one value a distance, and kept in VMEM for all rows of the batch.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.blocks import DIAGONAL, FULL, KEYS, KIND, MOST_BLOCKS, PARTIAL, QUERIES, Rule

LANES = 128
LOG2E = math.log2(math.e)
MASKED = -1e30  # of a score: finite, so that differences are
NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call of the kernels, in full; every field is known when the program is traced."""

    rule: Rule
    scale: float
    softcap: float | None = None
    reach: int = 0  # bias: tiles on each side of the diagonal's; 0: no bias
    sloped: bool = False  # bias: beyond the tiles it goes on linearly
    rate: float | None = None  # of dropout
    chunk: int = 256  # queries at a time within a block
    backward_chunk: int = 256
    vmem_bytes: int = 100 << 20  # of which the kernel may take
    interpret: object = False

    @property
    def tiles(self) -> int:
        return 2 * self.reach + 1


def fields(word):
    """(query block, key block, kind) of a table's word."""
    return word >> QUERIES, (word >> KEYS) & (MOST_BLOCKS - 1), (word >> KIND) & 3


def dot(a, b, dims=NN):
    """Product of two blocks into float32; float32 operands are multiplied as such."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def across(row, rows: int = LANES):
    """[1, n] as [n, 128]: a value a lane becomes a value a row."""
    return jnp.broadcast_to(row, (rows, row.shape[1])).T


def down(column):
    """[n, 1] as [1, n]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def tile_lanes(x, lanes: int):
    """[n, 128] repeated to [n, lanes]."""
    return x[:, :lanes] if lanes <= LANES else jnp.tile(x, (1, lanes // LANES))


def mask_of(rule: Rule, kind: int, shape, start, axis: int, ids, prefix, places=None):
    """The mask of a piece of a block, bool, or None where all is seen.

    shape: of the piece, with queries along ``axis``. start: (q0, k0), the indices of its first
    query and key. ids: segments of its queries and keys, broadcastable, or None. prefix: of its
    keys, or None. places: positions of its queries and keys, where they have some.
    """
    if kind == FULL:
        return None
    iota = [lax.broadcasted_iota(jnp.int32, shape, a) for a in (axis, 1 - axis)]
    if places is None:
        ahead = iota[1] - iota[0]  # key less query, but for the offset
        off = start[0] - start[1]
    else:
        ahead, off = places[1] - places[0], 0
    clauses = []
    if rule.causal:
        causal = ahead <= off
        clauses.append(causal if prefix is None else causal | (prefix != 0))
    if rule.window is not None:
        clauses += [ahead < off + rule.window, ahead > off - rule.window]
    if ids is not None:
        clauses.append(ids[0] == ids[1])
    if rule.bounded and kind == PARTIAL:
        clauses.append(iota[1] < rule.keys - start[1])
    mask = None
    for clause in clauses:
        mask = clause if mask is None else mask & clause
    return mask


def _each_tile(plan: Plan, body) -> None:
    """Unrolled, the tiles overlap; as a loop they compile faster where they are interpreted."""
    lax.fori_loop(0, plan.tiles, body, None, unroll=not plan.interpret)


def lay_tiles(strip_ref, tiles_ref, plan: Plan):
    """Writes tiles [tiles, 128, 128] from a strip [tiles + 1, 128] of one value a distance, of
    which the first is -(reach + 1) * 128. Tile t holds at row r, lane c the value at distance
    (t - reach) * 128 + c - r.

    Row r of a tile is 128 values of the strip moved r lanes to the right: bit by bit for the
    first eight rows, which then move together by multiples of eight.
    """
    wide, rows = 2 * LANES, 8
    row = lax.broadcasted_iota(jnp.int32, (rows, wide), 0)

    def lay(t, _):
        part = jnp.concatenate([strip_ref[pl.ds(t, 1)], strip_ref[pl.ds(t + 1, 1)]], axis=1)
        part = jnp.broadcast_to(part * LOG2E, (rows, wide))
        for bit in (1, 2, 4):
            part = jnp.where(row & bit == 0, part, pltpu.roll(part, bit, 1))
        for at in range(0, LANES, rows):
            tiles_ref[t, at : at + rows] = pltpu.roll(part, at, 1)[:, LANES:]

    _each_tile(plan, lay)


def gather_tiles(sums_ref, strip_ref, plan: Plan):
    """The transpose of ``lay_tiles``: sums along the diagonals of the tiles, into the strip. Row r
    goes r lanes to the left: eight rows together by a multiple of eight, then, added up, bit by
    bit of what remains."""
    wide, rows = 2 * LANES, 8
    row = lax.broadcasted_iota(jnp.int32, (rows, wide), 0)
    nothing = jnp.zeros((rows, LANES), jnp.float32)
    strip_ref[...] = jnp.zeros_like(strip_ref)

    def gather(t, _):
        total = jnp.zeros((rows, wide), jnp.float32)
        for at in range(0, LANES, rows):
            part = jnp.concatenate([nothing, sums_ref[t, at : at + rows]], axis=1)
            total += pltpu.roll(part, (wide - at) % wide, 1)
        for bit in (1, 2, 4):
            total = jnp.where(row & bit == 0, total, pltpu.roll(total, wide - bit, 1))
        total = jnp.sum(total, axis=0, keepdims=True)
        strip_ref[pl.ds(t, 1)] += total[:, :LANES]
        strip_ref[pl.ds(t + 1, 1)] += total[:, LANES:]

    _each_tile(plan, gather)


def tile_index(plan: Plan, diagonal):
    """(tile, steps beyond it) of the tile that lies ``diagonal`` tiles off the main diagonal."""
    inside = jnp.clip(diagonal, -plan.reach, plan.reach)
    return inside + plan.reach, jnp.abs(diagonal - inside)


def block_bias(plan: Plan, tiles_ref, far, shape, diagonal):
    """Bias of a piece of a block, float32 of ``shape``. ``diagonal``: of its first tile, in tiles.
    far: slope beyond the tiles, of a whole tile's step, where the plan is sloped."""
    rows, lanes = (n // LANES for n in shape)
    values = {}
    for d in range(1 - rows, lanes):
        tile, beyond = tile_index(plan, diagonal + d)
        value = tiles_ref[tile]
        values[d] = value + far * beyond.astype(jnp.float32) if plan.sloped else value
    stripes = [jnp.concatenate([values[b - a] for b in range(lanes)], 1) for a in range(rows)]
    return jnp.concatenate(stripes, 0)


def offset(plan: Plan, ref):
    """What the first query's place is ahead of the first key's."""
    return ref["shift"][0, 0] if "shift" in ref else plan.rule.offset


def kinds_of(rule: Rule, kind, body) -> None:
    """Runs ``body(kind)`` for the kind of block at hand; each is a program of its own."""
    for known in rule.kinds:
        pl.when(kind == known)(lambda known=known: body(known))


def keys_seen(rule: Rule, kind: int, chunk_end: int) -> int:
    """How many of the block's keys a chunk of its queries can see."""
    return min(chunk_end, rule.block_k) if kind == DIAGONAL else rule.block_k


def in_chunks(length: int, most: int) -> list[tuple[int, int]]:
    """Equal pieces of ``length``, a multiple of 128, of at most ``most`` and a multiple of 128."""
    tiles = length // LANES
    size = max(n for n in range(1, tiles + 1) if tiles % n == 0 and n * LANES <= max(most, LANES))
    return [(at, at + size * LANES) for at in range(0, length, size * LANES)]


def compiler_parameters(plan: Plan) -> dict:
    """Keyword arguments of ``pallas_call`` over a grid of groups of heads, batch, heads of the
    group, pairs of blocks. What is kept of a bias from one row of the batch to the next ties
    these to one core."""
    if plan.interpret:
        return {"interpret": plan.interpret}
    rows = "arbitrary" if plan.reach else "parallel"
    parameters = pltpu.CompilerParams(
        dimension_semantics=("parallel", rows, "arbitrary", "arbitrary"),
        vmem_limit_bytes=plan.vmem_bytes,
    )
    return {"compiler_params": parameters}
