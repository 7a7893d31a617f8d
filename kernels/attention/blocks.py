"""Which blocks of queries and keys a kernel visits, and what it must check in each.

The rule leaves a set of (query block, key block) pairs. Each is one word of a table that the
kernel reads ahead of the blocks, in the order of the queries; empty pairs are not in it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

EMPTY, FULL, DIAGONAL, PARTIAL = range(4)
FIRST, LAST, KIND, KEYS, QUERIES = 0, 1, 2, 4, 17  # bits at which the fields of a word begin
MOST_BLOCKS = 1 << (QUERIES - KEYS)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is known of the mask when the program is traced; lengths before padding.

    Queries stand at indices ``offset``, ``offset + 1``, ... and keys at 0, 1, ..., or both where
    arrays of ``positions`` say.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    causal: bool = False
    window: int | None = None
    segments: bool = False
    prefix: bool = False
    offset: int = 0
    positions: bool = False

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.block_k)

    @property
    def padded_queries(self) -> int:
        return self.query_blocks * self.block_q

    @property
    def padded_keys(self) -> int:
        return self.key_blocks * self.block_k

    @property
    def bounded(self) -> bool:
        """Whether keys of padding have to be masked by their index: with segments theirs is 0,
        and in causal order they come after every query."""
        ordered = self.causal and not self.prefix and not self.positions
        after = ordered and self.offset + self.queries <= self.keys
        return self.padded_keys > self.keys and not self.segments and not after

    @property
    def lonely(self) -> bool:
        """Whether a query may see no key at all."""
        anywhere = self.positions and (self.causal or self.window is not None)
        window = self.window is not None and self.queries > self.keys
        return self.segments or anywhere or window

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds of block that can occur."""
        aligned = self.block_q == self.block_k and self.offset % self.block_k == 0
        diagonal = self.causal and aligned and not self.positions
        partial = (
            self.segments
            or self.prefix
            or self.window is not None
            or self.bounded
            or (self.causal and not diagonal)
        )
        return (FULL, *((DIAGONAL,) if diagonal else ()), *((PARTIAL,) if partial else ()))


def edges_of(rule: Rule, positions=None, kv_positions=None):
    """The first and last index of each block of queries, [query blocks, 1], and of keys,
    [1, key blocks]; with positions [1 or B, padded length], the least and the greatest."""
    if positions is not None:
        queries = _blocks(positions, rule.block_q)[:, :, None]
        keys = _blocks(kv_positions, rule.block_k)[:, None]
        return queries.min(-1), queries.max(-1), keys.min(-1), keys.max(-1)
    q0 = np.arange(rule.query_blocks)[:, None] * rule.block_q + rule.offset
    k0 = np.arange(rule.key_blocks)[None] * rule.block_k
    q1 = np.minimum(q0 + rule.block_q, rule.offset + rule.queries) - 1
    k1 = np.minimum(k0 + rule.block_k, rule.keys) - 1
    return q0, q1, k0, k1


def in_order(rule: Rule, edges):
    """(possible, full): which pairs the causal clause leaves, and leaves whole, before any prefix,
    bool [.., query blocks, key blocks] (numpy but for positions)."""
    q0, q1, k0, k1 = edges
    possible = np.ones((rule.query_blocks, rule.key_blocks), bool)
    full = possible.copy()
    ends = (np.arange(rule.key_blocks)[None] + 1) * rule.block_k
    if rule.causal:
        possible = possible & (k0 <= q1)
        last = k1 if rule.positions else ends - 1  # with the keys of padding: see ``bounded``
        full = full & (last <= q0)
    if rule.bounded:
        full = full & (ends <= rule.keys)
    return possible, full


def in_window(rule: Rule, edges):
    """(possible, full) of the window's clause."""
    if rule.window is None:
        return True, True
    q0, q1, k0, k1 = edges
    near = (k0 - q1 < rule.window) & (q0 - k1 < rule.window)
    inside = (abs(k1 - q0) < rule.window) & (abs(q1 - k0) < rule.window)
    return near, inside


def word_at(table, b, p):
    """The word of pair p in row b of the batch; one row serves all where the rule is the same."""
    return table[0 if table.shape[0] == 1 else b, p]


def table(
    rule: Rule, segments=None, kv_segments=None, prefix=None, positions=None, kv_positions=None
):
    """int32 [1 or B, pairs]: the words of the pairs to visit, in order, and how many there are.

    Every query block has a pair, an empty one if nothing is left of it, so that its result is
    written. Rows of the batch with fewer pairs than the most end in words that do nothing.
    segments, kv_segments [B, padded length] (0: padding), prefix [B, padded keys], positions and
    kv_positions [1 or B, padded length], both or neither, filled up with values that occur. From
    numpy's arrays comes one of numpy's.
    """
    kinds, static = kinds_of_pairs(rule, segments, kv_segments, prefix, positions, kv_positions)
    return _words(kinds, static, np if isinstance(kinds, np.ndarray) else jnp)


def kinds_of_pairs(
    rule: Rule, segments=None, kv_segments=None, prefix=None, positions=None, kv_positions=None
):
    """(kinds, static): the kind of every pair, int32 [1 or B, query blocks, key blocks], and which
    of them any batch can need. Arguments as of ``table``. From numpy's arrays come numpy's."""
    arrays = (segments, prefix, positions, kv_positions)
    xp = np if not any(isinstance(x, jax.Array) for x in arrays) else jnp
    edges = edges_of(rule, positions, kv_positions)
    possible, full = in_order(rule, edges)
    near, inside = in_window(rule, edges)
    diagonal = np.zeros((rule.query_blocks, rule.key_blocks), bool)
    if DIAGONAL in rule.kinds:
        diagonal = edges[0] == edges[2]
        if rule.bounded:
            diagonal = diagonal & (edges[2] + rule.block_k <= rule.keys)
    if segments is None and prefix is None and positions is None:
        kinds = _kinds(possible & near, full & inside, diagonal, np)[None]
        return kinds, kinds != EMPTY
    # Pairs that no batch can need are left out before the program runs.
    static = np.ones_like(diagonal)
    if positions is None:
        static = (static if prefix is not None else possible) & near
    if prefix is not None:
        some = _blocks(prefix != 0, rule.block_k)
        possible = possible | some.any(-1)[:, None]
        full = full | (some.all(-1)[:, None] & np.asarray(not rule.bounded))
        diagonal = diagonal & ~some.any(-1)[:, None]
    possible, full = possible & near, full & inside
    if segments is not None:
        overlap, alike = _by_segment(rule, segments, kv_segments, xp)
        possible, full = possible & overlap, full & alike
    shape = np.broadcast_shapes(possible.shape, full.shape, diagonal.shape)
    kinds = xp.broadcast_to(_kinds(possible, full, diagonal, xp), shape)
    return kinds if kinds.ndim == 3 else kinds[None], static[None]


def _kinds(possible, full, diagonal, xp):
    kind = xp.where(full, FULL, xp.where(diagonal, DIAGONAL, PARTIAL))
    return xp.where(possible, kind, EMPTY).astype(xp.int32)


def _blocks(x, size: int):
    return x.reshape(x.shape[0], -1, size)


def _by_segment(rule: Rule, segments, kv_segments, xp):
    """(overlap, alike): blocks whose ranges of segments meet; that hold one segment, the same."""
    far = np.iinfo(np.int32).max

    def ends(x, size):
        x = _blocks(x, size)
        lowest = xp.where(x == 0, far, x).min(-1)
        return x.min(-1), lowest, x.max(-1)

    q_min, q_low, q_high = (x[:, :, None] for x in ends(segments, rule.block_q))
    k_min, k_low, k_high = (x[:, None, :] for x in ends(kv_segments, rule.block_k))
    overlap = (q_low <= k_high) & (k_low <= q_high)
    alike = (q_min == q_high) & (k_min == k_high) & (q_min == k_min) & (q_min != 0)
    return overlap, alike


def _words(kinds, static, xp) -> jax.Array | np.ndarray:
    """Words of the pairs with a kind, row by row; ``static`` bounds them."""
    batch, rows, columns = kinds.shape
    # A row of blocks with nothing in it keeps its first pair.
    empty_row = (kinds == EMPTY).all(-1)
    first_column = xp.arange(columns) == 0
    keep = (kinds != EMPTY) | (empty_row[..., None] & first_column)
    allowed = np.broadcast_to(static, (1, rows, columns)) | (np.arange(columns) == 0)
    places = np.flatnonzero(allowed.reshape(-1))
    kinds, keep = (x.reshape(batch, -1)[:, places] for x in (kinds, keep))
    i = xp.broadcast_to(xp.asarray(places // columns, dtype=xp.int32), kinds.shape)
    j = xp.broadcast_to(xp.asarray(places % columns, dtype=xp.int32), kinds.shape)
    if xp is np and batch == 1:  # drop what is not kept
        i, j, kinds = (x[keep][None] for x in (i, j, kinds))
        keep = np.ones_like(i, bool)
    else:
        order = xp.argsort(~keep, axis=1, stable=True)
        i, j, kinds, keep = (xp.take_along_axis(x, order, 1) for x in (i, j, kinds, keep))
        # What follows the last pair stays at its blocks, so that nothing is fetched for it.
        last = keep.sum(1, keepdims=True) - 1
        i, j = (xp.where(keep, x, xp.take_along_axis(x, last, 1)) for x in (i, j))
        kinds = xp.where(keep, kinds, EMPTY)
    edge = xp.ones((batch, 1), bool)
    changes = (i[:, 1:] != i[:, :-1]) & keep[:, 1:]
    first = xp.concatenate([edge, changes], 1) & keep
    last = xp.concatenate([changes | ~keep[:, 1:], edge], 1) & keep
    word = (i << QUERIES) | (j << KEYS) | (kinds << KIND)
    return (word | (last << LAST) | (first << FIRST)).astype(xp.int32)
