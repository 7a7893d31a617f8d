"""How many floating-point operations a traced program runs, over loops by their trips.

Products of matrices alone, 2 m k n each, which is what chips' peaks are given for; what is
computed again in a backward pass counts again.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def operations(traced: Any) -> float:
    """Of ``jax.make_jaxpr(f)(...)``, on all devices together.

    Of branches the longest counts (so do blocks that a kernel skips), of loops whose length is only
    known on the device one turn.
    """
    jaxpr = traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        inner = math.prod(shape[i] for i in contracted)
        return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "ragged_dot_general":
        return 2.0 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1]
    if name == "pallas_call":
        steps = [n for n in params["grid_mapping"].grid if isinstance(n, int)]
        return math.prod(steps) * operations(params["jaxpr"])
    inner = [operations(j) for j in jax.tree.leaves(_programs(params), is_leaf=_is_program)]
    if not inner:
        return 0.0
    if name == "cond":
        return max(inner)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = params["mesh"].size
    return times * sum(inner)


def _is_program(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)


def _programs(params: dict[str, Any]) -> list[Any]:
    """The programs among an equation's parameters, those in tuples too."""
    found = []
    for value in params.values():
        each = value if isinstance(value, tuple | list) else (value,)
        found += [one for one in each if _is_program(one)]
    return found
