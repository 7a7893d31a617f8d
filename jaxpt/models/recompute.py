"""What the backward pass computes again within a layer where remat is "elementwise": norms and
activations, of which it keeps the inputs alone. They would keep several arrays as large."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

# whether XLA is kept from merging both computations; None: nothing is computed again
_active: contextvars.ContextVar[bool | None] = contextvars.ContextVar("recompute", default=None)


@contextlib.contextmanager
def elementwise(*, prevent_cse: bool) -> Iterator[None]:
    """While a layer is traced, ``recomputed`` has its functions computed again."""
    token = _active.set(prevent_cse)
    try:
        yield
    finally:
        _active.reset(token)


def recomputed(function: Callable) -> Callable:
    """The function, of whose call the backward pass keeps the arguments alone if it is to."""
    prevent_cse = _active.get()
    return function if prevent_cse is None else jax.checkpoint(function, prevent_cse=prevent_cse)
