"""Wall time of several functions on one device, fairly: in turns, by medians.

A machine's speed drifts (clocks, heat, neighbours). So the functions take turns, round by round,
and what is compared was measured within the same seconds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the rounds, and their quartiles."""

    seconds: float
    low: float
    high: float
    calls: int  # in all, but for those before the first round


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    round_seconds: float = 0.05,
    most_calls: int = 100,
) -> dict[str, Timing]:
    """Times each function, called without arguments, its result waited for.

    In a round each function is called in a row as often as fits ``round_seconds`` (at least once,
    at most ``most_calls``), and the last result is waited for: a device runs in order what it is
    given, so that the host's own work lies beside that of the device where calls are long enough.
    The order of the functions turns from round to round.

    Args:
      functions: jitted ones with their arguments bound; their first two calls are not counted.
      rounds: of which the median is taken; at least 1.

    Raises:
      ValueError: no function, or no round.
    """
    if not functions or rounds < 1:
        raise ValueError(f"{len(functions)} functions in {rounds} rounds: nothing to time")
    calls = {}
    for name, function in functions.items():
        jax.block_until_ready(function())  # compiles
        calls[name] = int(np.clip(round_seconds / _seconds(function, 1), 1, most_calls))
    names = list(functions)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            found[name].append(_seconds(functions[name], calls[name]))
    return {
        name: Timing(
            *(float(np.quantile(seconds, at)) for at in (0.5, 0.25, 0.75)),
            calls=calls[name] * rounds,
        )
        for name, seconds in found.items()
    }


def _seconds(function: Callable[[], Any], calls: int) -> float:
    """Seconds of a call, of so many in a row."""
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def matmul_rate(dtype: Any = jnp.bfloat16, size: int | None = None, **options: Any) -> float:
    """FLOP/s of a square matrix product on the default device, with a result of the same dtype.

    Args:
      size: of the matrices; None: 8192, or 512 on a CPU.
      options: as of ``interleaved``.
    """
    size = size or (512 if jax.default_backend() == "cpu" else 8192)
    a, b = (
        jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0))
    )
    product = jax.jit(jnp.matmul)
    seconds = interleaved({"product": lambda: product(a, b)}, **options)["product"].seconds
    return 2 * size**3 / seconds
