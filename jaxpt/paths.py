"""Paths of parameters: the names that patterns match and that per-parameter rules go by."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax


def without_number(path: str) -> str:
    """``decoder/layers_3/mlp/up/w`` -> ``decoder/layers/mlp/up/w``: the same name for every layer,
    whether the layers are stacked or stand alone."""
    return re.sub(r"_\d+(?=/)", "", path)


def matches(pattern: str, path: str) -> bool:
    """Whether a shell-style pattern fits the path, with or without the layer's number in it.

    ``*`` also crosses ``/``, as in the patterns for weights and initialisers.
    """
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(without_number(path), pattern)


def known(paths: Iterable[str]) -> str:
    """The paths as one line for an error message, each layer's once."""
    return ", ".join(sorted({without_number(path) for path in paths}))


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``jax.tree.map`` whose function gets the leaf's path (keys joined by ``/``) first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(
            jax.tree_util.keystr(path, simple=True, separator="/"), *leaves
        ),
        tree,
        *rest,
    )
