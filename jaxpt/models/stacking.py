"""Modules as (template, parameters), and layers stacked on a leading axis or standing alone."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from jaxpt.state import Params
from jaxpt.weights.module import Template, merge, split

__all__ = ["Template", "merge", "split", "stacked", "unstacked"]


def stacked(params: Params) -> Params:
    """Unrolled parameters (``layers_0``, ``layers_1``, ...) as scanned ones (``layers``)."""
    if not isinstance(params, dict):
        return params
    layers = {k: v for k, v in params.items() if re.fullmatch(r"layers_\d+", k)}
    rest = {k: stacked(v) for k, v in params.items() if k not in layers}
    if layers:
        ordered = [layers[f"layers_{i}"] for i in range(len(layers))]
        rest["layers"] = jax.tree.map(lambda *xs: jnp.stack(xs), *ordered)
    return rest


def unstacked(params: Params) -> Params:
    """Scanned parameters (``layers``) as unrolled ones (``layers_0``, ``layers_1``, ...)."""
    if not isinstance(params, dict):
        return params
    rest = {k: unstacked(v) for k, v in params.items() if k != "layers"}
    if "layers" in params:
        count = len(jax.tree.leaves(params["layers"])[0])
        for i in range(count):
            rest[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], params["layers"])
    return rest
