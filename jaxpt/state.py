"""The training state: plain nested dicts of arrays, and how they are laid on the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]  # nested dict of arrays, keyed by module names


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a train step reads and writes.

    step: int32 scalar, optimizer steps since the run began, over all phases.
    params: nested dict of arrays; scanned layers are stacked on a leading axis.
    opt_state: the optimizer's pytree.
    extra: state of the phase's updates (masks, averages, guards), by their names.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def flatten(tree: Any, separator: str = "/") -> dict[str, Any]:
    """Any pytree as ``{path: leaf}``, paths joined from dict keys, field names and indices."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {separator.join(_name(k) for k in path): leaf for path, leaf in leaves}


def _name(key) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def unflatten(flat: dict[str, Any], separator: str = "/") -> Params:
    """The nested dict whose ``flatten`` is ``flat``."""
    nested: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split(separator)
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return nested


def trainable(tree: Any, paths: Container[str] | None = None) -> Any:
    """The tree with None in the place of arrays of integers, which nothing can train, and, where
    ``paths`` are given, of all that is not among them."""
    kept = {
        path: jnp.issubdtype(x.dtype, jnp.floating) and (paths is None or path in paths)
        for path, x in flatten(tree).items()
    }
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        x if keep else None for x, keep in zip(leaves, kept.values(), strict=True)
    )


def whole(trained: Any, tree: Any) -> Any:
    """``trained``, with what it has not (None) taken from ``tree``: inverts ``trainable``."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, tree, is_leaf=_is_none)


def _is_none(x: Any) -> bool:
    return x is None
