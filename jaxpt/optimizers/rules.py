"""The rule of an optimizer: how one array is updated from its own gradients.

Of a stacked tensor every layer is an array of its own, so that nothing depends on whether layers
are stacked, and a step may update one layer at a time.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpt.optimizers.groups import Tensors
from jaxpt.optimizers.paths import map_with_path, without_number
from jaxpt.weights.base import Tensor


class Rule(NamedTuple):
    """Two pure functions of one array.

    init: parameter -> state, a pytree of arrays.
    update: (gradient, state, parameter, updates made before this one, key) -> (direction, state).
      The direction is not negated and without learning rate. The key depends on the optimizer's
      seed and on the parameter's path and layer, not on the step.
    elementwise: whether each entry goes by itself (in 8 bits, each block of a row), so that
      ``update`` may be called on blocks of rows, each with a key of its own.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
    elementwise: bool = False


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
        def one(path, param):
            if path not in rules:
                return None
            init = rules[path].init
            return jax.vmap(init)(param) if tensors[path].stacked else init(param)

        return ByTensor(jnp.zeros([], jnp.int32), map_with_path(one, params))

    def update_fn(updates, state, params=None):
        def one(path, grad, own, param):
            if path not in rules:
                return jnp.zeros_like(grad), None
            update, keys = rules[path].update, keys_of(path, tensors[path], seed)
            if not tensors[path].stacked:
                return update(grad, own, param, state.count, keys)
            if in_turn:
                return _in_turn(update, grad, own, param, state.count, keys)
            return jax.vmap(update, (0, 0, 0, None, 0))(grad, own, param, state.count, keys)

        pairs = map_with_path(one, updates, state.states, params)
        tree = jax.tree.structure(updates)
        found = tree.flatten_up_to(pairs)
        changes, states = (tree.unflatten(part) for part in zip(*found, strict=True))
        return changes, ByTensor(state.count + 1, states)

    return optax.GradientTransformation(init_fn, update_fn)


def _in_turn(update, grads, states, params, count, keys):
    """``update`` layer by layer; directions take the gradients' place."""

    def layer(i, carry):
        at = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), carry)
        param = jax.lax.dynamic_index_in_dim(params, i, keepdims=False)
        # All is read before anything is written: else XLA keeps copies of the whole carry.
        at = jax.lax.optimization_barrier(at)
        new = jax.lax.optimization_barrier(update(*at, param, count, keys[i]))
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, 0), carry, new
        )

    return jax.lax.fori_loop(0, len(grads), layer, (grads, states))


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
