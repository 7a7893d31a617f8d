"""The update of one array of a stack (or of those of a weight that are updated as one), in place
and a block of rows at a time.

A rule's temporaries are several float32 arrays of its parameter's size. Where each entry goes by
itself (``Rule.elementwise``) they are made of a few million entries at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxpt.guard import kept
from jaxpt.mesh import active_layout
from jaxpt.optimizers.rules import Rule
from jaxpt.weights.base import Tensor

# Entries of a block on one device: large enough to fill a chip, small beside a layer (assumed).
BLOCK_ENTRIES = 2**22
# Rows of a tile of bytes on TPUs. Of blocks that begin within one XLA makes a copy of all.
TILE = 32


def update_in_place(
    rule: Rule,
    tensor: Tensor,
    stacks: Any,
    grad: Any,
    scale: jax.Array,
    count: jax.Array,
    key: jax.Array,
    at: Any,
    good: jax.Array | None = None,
) -> tuple[Any, jax.Array]:
    """Updates array number ``at`` of a stack of parameters and that of their states.

    Args:
      rule: gradient -> change.
      tensor: row of the table, of one array.
      stacks: (parameters [L, ...], states, a pytree of arrays [L, ...]).
      grad: of the one array.
      scale: factor of the gradient, float32 scalar.
      count: updates made before this one.
      key: of the one array.
      at: int32 scalar.
      good: bool scalar; where it is False, all stays as it is.

    Returns:
      (the stacks with the array's update in them, sum of the squares of its change).
    """
    stacks = _pinned(stacks)
    ways, size = block_rows(tensor) if rule.elementwise else (1, None)
    if size is None:
        old = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False), stacks)
        new, square = _changed(rule, old, grad, scale, count, key, good)
        put = jax.lax.dynamic_update_index_in_dim
        return _pinned(jax.tree.map(lambda a, b: put(a, b, at, 0), stacks, new)), square
    rows = grad.shape[0] // ways
    # What lies on a device of its own stays there: blocks are cut out of each device's rows.
    cut = jax.tree.map(lambda a: a.reshape(len(a), ways, rows, *a.shape[2:]), stacks)
    grads = grad.reshape(ways, rows, *grad.shape[1:])

    def block(start, size, carry):
        stacks, square = carry

        def place(a):
            return (at, 0, start) + (0,) * (a.ndim - 3)

        old = jax.tree.map(
            lambda a: jax.lax.dynamic_slice(a, place(a), (1, ways, size, *a.shape[3:]))[0], stacks
        )
        part = jax.lax.dynamic_slice_in_dim(grads, start, size, axis=1)
        own = jax.random.fold_in(key, start)
        new, more = _changed(rule, old, part, scale, count, own, good)
        put = jax.lax.dynamic_update_slice
        return jax.tree.map(lambda a, b: put(a, b[None], place(a)), stacks, new), square + more

    carry = (cut, jnp.float32(0))
    carry = jax.lax.fori_loop(0, rows // size, lambda i, c: block(i * size, size, c), carry)
    if rows % size:
        carry = block(rows - rows % size, rows % size, carry)
    return _pinned(jax.tree.map(lambda a, b: a.reshape(b.shape), carry[0], stacks)), carry[1]


def block_rows(tensor: Tensor) -> tuple[int, int | None]:
    """(devices over which the rows are cut, rows of each device that make a block: None where they
    are no more than one)."""
    if len(tensor.shape) < 2:
        return 1, None
    layout = active_layout()
    ways = [layout.ways(axis) if layout and axis else 1 for axis in tensor.axes]
    held = [n // k for n, k in zip(tensor.shape, ways, strict=True)]
    row = 1
    for n in held[1:]:
        row *= n
    size = max(1, BLOCK_ENTRIES // row)
    if size > TILE:
        size -= size % TILE
    return ways[0], None if size >= held[0] else size


def _pinned(tree: Any) -> Any:
    """Laid out in memory row by row, as what a step is given: else a product in a rule that likes
    its operand turned round has XLA turn the whole stack, which is a copy of it."""
    return jax.tree.map(lambda a: with_layout_constraint(a, Layout(tuple(range(a.ndim)))), tree)


def _changed(
    rule: Rule,
    old: Any,
    grad: Any,
    scale: jax.Array,
    count: jax.Array,
    key: jax.Array,
    good: jax.Array | None,
):
    """((parameter, state) after the update, sum of the squares of the change)."""
    # Read, changed, written: without the barriers XLA keeps a copy of what is written to.
    (param, state), grad = jax.lax.optimization_barrier((old, grad))
    grad = jax.tree.map(lambda g: (scale * g).astype(g.dtype), grad)
    change, new = rule.update(grad, state, param, count, key)
    square = optax.tree.norm(jax.tree.map(lambda c: c.astype(jnp.float32), change), squared=True)
    changed = jax.tree.map(lambda p, c: (p + c).astype(p.dtype), param, change)
    found = kept(good, ((changed, new), square), ((param, state), jnp.zeros_like(square)))
    return jax.lax.optimization_barrier(found)
