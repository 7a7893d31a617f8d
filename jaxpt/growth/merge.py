"""One model of several of the same shape: averages, greedy soups, task arithmetic.

Pure functions from parameters to parameters: nested dicts of arrays, all of one structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxpt.errors import ConfigError
from jaxpt.state import Params, flatten


def uniform(states: Sequence[Params]) -> Params:
    """The mean of the parameters, in float32, given in the first one's types.

    Wortsman et al. 2022 ("Model soups"), the uniform soup; of checkpoints of one run, Izmailov et
    al. 2018. What is made of integers has to be equal in all, and stays.

    Raises:
      ConfigError: none given, or parameters of other names, shapes or integers.
    """
    check(states)

    def mean(*arrays):
        if not jnp.issubdtype(arrays[0].dtype, jnp.floating):
            return arrays[0]
        total = sum(x.astype(jnp.float32) for x in arrays[1:]) + arrays[0].astype(jnp.float32)
        return (total / len(arrays)).astype(arrays[0].dtype)

    return jax.tree.map(mean, *states)


def greedy_soup(
    states: Sequence[Params], score: Callable[[Params], float]
) -> tuple[Params, list[int]]:
    """The mean of those that make it better (Wortsman et al. 2022, recipe 1).

    From the best alone downwards, each is added if the mean with it scores no lower.

    Args:
      score: parameters -> a number, of held-out data; higher is better.

    Returns:
      (the mean, which states are in it, in the order in which they came).

    Raises:
      ConfigError: as ``uniform``.
    """
    check(states)
    alone = [score(state) for state in states]
    order = sorted(range(len(states)), key=lambda i: -alone[i])
    kept, best = order[:1], alone[order[0]]
    for i in order[1:]:
        found = score(uniform([states[j] for j in [*kept, i]]))
        if found >= best:
            kept, best = [*kept, i], found
    return uniform([states[j] for j in kept]), kept


def task_arithmetic(base: Params, states: Sequence[Params], scale: float = 1.0) -> Params:
    """base + scale times the sum of (state - base), in float32 (Ilharco et al. 2023, section 2).

    With a negative scale and one state it takes a task away.

    Raises:
      ConfigError: as ``uniform``, with the base among the states.
    """
    if not states:
        raise ConfigError("states", "none given")
    check([base, *states])

    def add(first, *arrays):
        if not jnp.issubdtype(first.dtype, jnp.floating):
            return first
        start = first.astype(jnp.float32)
        return (start + scale * sum(x.astype(jnp.float32) - start for x in arrays)).astype(
            first.dtype
        )

    return jax.tree.map(add, base, *states)


def check(states: Sequence[Params]) -> None:
    """Raises ConfigError unless all have the first one's names, shapes and, where they are known
    (not while a function is traced), integers."""
    if not states:
        raise ConfigError("states", "none given")
    first = flatten(states[0])
    for i, state in enumerate(states[1:], 1):
        own = flatten(state)
        for path in dict.fromkeys([*first, *own]):
            a, b = (str(x[path].shape) if path in x else "nothing at all" for x in (first, own))
            if a != b:
                raise ConfigError(
                    f"states.{i}", f"at {path} it has {b}, and the first has {a}; no mean of these"
                )
            floating = jnp.issubdtype(first[path].dtype, jnp.floating)
            if floating or isinstance(first[path], Tracer):
                continue
            if not bool((first[path] == own[path]).all()):
                raise ConfigError(
                    f"states.{i}",
                    f"its integers at {path} are not the first one's: no mean of these",
                )
