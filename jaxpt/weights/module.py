"""Modules as (template, parameters)."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxpt.state import Params

Template = tuple[Any, Any]  # graph definition, and a state whose leaves only show their place


def split(module: nnx.Module) -> tuple[Template, Params]:
    """The module as a template and a nested dict of its parameters."""
    graph, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    blank = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return (graph, blank), params


def merge(template: Template, params: Params) -> Any:
    """The module with these parameters. Cheap; meant for use while tracing."""
    graph, blank = template
    state = jax.tree.map(lambda x: x, blank)  # containers of its own
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
