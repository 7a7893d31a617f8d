"""The rule of an optimizer: how one array is updated from its own gradients, or all arrays of one
weight from theirs.

Of a stacked tensor every layer is an array of its own, so that nothing depends on whether layers
are stacked, and a step may update one layer at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpt.optimizers.groups import Tensors
from jaxpt.paths import without_number
from jaxpt.state import flatten
from jaxpt.weights.base import Tensor


class Rule(NamedTuple):
    """Two pure functions of one array; or of the arrays of one weight.

    init: parameter -> state, a pytree of arrays.
    update: (gradient, state, parameter, updates made before this one, key) -> (direction, state).
      The direction is not negated and without learning rate. The key depends on the optimizer's
      seed and on the parameter's path and layer, not on the step.
    elementwise: whether each entry goes by itself (in 8 bits, each block of a row), so that
      ``update`` may be called on blocks of rows, each with a key of its own.
    together: paths of the tensors of one weight that are updated as one, two or more. Parameter,
      gradient, state and direction are then dicts of theirs, by the last parts of the paths.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, jax.Array, jax.Array], tuple[Any, Any]]
    elementwise: bool = False
    together: tuple[str, ...] = ()


class ByTensor(NamedTuple):
    """count: int32 scalar, updates made. states: of each parameter, stacked as it is."""

    count: jax.Array
    states: Any


def of_optax(transform: optax.GradientTransformation, *, elementwise: bool = False) -> Rule:
    """The rule that an optax transformation is, for one array.

    What it counts is not kept: the rule is told. Neither is what never changes.
    """
    given = ("count", "ns_coeffs")  # fields of optax's states

    def split(state):
        flat, tree = jax.tree_util.tree_flatten_with_path(state)
        names = [getattr(path[-1], "name", None) if path else None for path, _ in flat]
        return flat, names, tree

    def init(param):
        flat, names, tree = split(transform.init(param))
        return tree.unflatten(
            None if n in given else x for (_, x), n in zip(flat, names, strict=True)
        )

    def update(grad, state, param, step, key):
        del key
        flat, names, tree = split(transform.init(param))  # of which only constants are used
        kept = iter(jax.tree.leaves(state))
        full = tree.unflatten(
            step if n == "count" else x if n in given else next(kept)
            for (_, x), n in zip(flat, names, strict=True)
        )
        direction: Any
        direction, new = transform.update(grad, full, param)
        flat, names, tree = split(new)
        return direction, tree.unflatten(
            None if n in given else x for (_, x), n in zip(flat, names, strict=True)
        )

    return Rule(init, update, elementwise)


def by_tensor(
    tensors: Tensors, rules: Mapping[str, Rule], seed: int = 0, *, in_turn: bool = False
) -> optax.GradientTransformation:
    """Each parameter by its own rule, over nested dicts of parameters.

    Args:
      tensors: the model's table; its paths are those of the parameters.
      rules: path -> rule; what has none has no state and an update of zeros.
      seed: of the keys.
      in_turn: update stacked layers one after the other, in place, and not all at once: what a
        rule makes on the way then lives for one layer only. (So it is on TPUs and GPUs: on CPUs
        XLA copies what a loop writes to.)
    """

    def init_fn(params):
        flat, states = flatten(params), {}
        for paths in units(rules, flat):
            init = rules[paths[0]].init
            init = jax.vmap(init) if tensors[paths[0]].stacked else init
            states |= scattered(paths, init(gathered(flat, paths)))
        tree = jax.tree.structure(params)
        return ByTensor(jnp.zeros([], jnp.int32), tree.unflatten(states.get(p) for p in flat))

    def update_fn(updates, state, params=None):
        tree, grads, flat = jax.tree.structure(updates), flatten(updates), flatten(params)
        states = dict(zip(grads, tree.flatten_up_to(state.states), strict=True))
        changes = {path: jnp.zeros_like(grads[path]) for path in grads.keys() - rules.keys()}
        for paths in units(rules, grads):
            update, tensor = rules[paths[0]].update, tensors[paths[0]]
            if tensor.stacked:
                update = functools.partial(_in_turn, update) if in_turn else _at_once(update)
            own = [gathered(each, paths) for each in (grads, states, flat)]
            change, new = update(*own, state.count, keys_of(paths[0], tensor, seed))
            changes |= scattered(paths, change)
            states |= scattered(paths, new)
        changes, states = (tree.unflatten(each[p] for p in grads) for each in (changes, states))
        return changes, ByTensor(state.count + 1, states)

    return optax.GradientTransformation(init_fn, update_fn)


def units(rules: Mapping[str, Rule], paths: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Those of ``paths`` that have a rule, each with the others that are updated with it."""
    for path in paths:
        unit = rules[path].together or (path,) if path in rules else ()
        if path in unit[:1]:
            yield unit


def gathered(tree: Mapping[str, Any], paths: tuple[str, ...]) -> Any:
    """What a rule takes, of a unit: the only one, or a dict by the last parts of the paths."""
    if len(paths) == 1:
        return tree[paths[0]]
    return {path.rpartition("/")[2]: tree[path] for path in paths}


def scattered(paths: tuple[str, ...], found: Any) -> dict[str, Any]:
    """Path -> what a rule gives for it: inverts ``gathered``."""
    if len(paths) == 1:
        return {paths[0]: found}
    return {path: found[path.rpartition("/")[2]] for path in paths}


def _at_once(update):
    return jax.vmap(update, (0, 0, 0, None, 0))


def _in_turn(update, grads, states, params, count, keys):
    """``update`` layer by layer; directions take the gradients' place."""

    def at(tree, i):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)

    def layer(i, carry):
        # All is read before anything is written: else XLA keeps copies of the whole carry.
        grad, state = jax.lax.optimization_barrier(at(carry, i))
        new = jax.lax.optimization_barrier(update(grad, state, at(params, i), count, keys[i]))
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, 0), carry, new
        )

    return jax.lax.fori_loop(0, len(keys), layer, (grads, states))


def one_layer(tensor: Tensor) -> Tensor:
    """The row of one layer of a stacked tensor; the tensor itself where it is not stacked."""
    if not tensor.stacked:
        return tensor
    return dataclasses.replace(tensor, shape=tensor.shape[1:], axes=tensor.axes[1:])


def keys_of(path: str, tensor: Tensor, seed: int) -> jax.Array:
    """The key of a parameter, or those of its layers: the same whether these are stacked."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(without_number(path).encode()))
    if tensor.stacked:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(tensor.shape[0]))
    number = re.search(r"_(\d+)(?=/)", path)
    return jax.random.fold_in(key, int(number.group(1)) if number else 0)
