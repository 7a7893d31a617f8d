"""Which platform the program that is being traced is for: that of JAX, unless it is compiled ahead
of time for another."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_target: contextvars.ContextVar[Any] = contextvars.ContextVar("kernels_target", default=None)


def platform() -> str:
    """One of cpu, gpu and tpu."""
    device = _target.get()
    return jax.default_backend() if device is None else device.platform


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """While a program is traced that this ``jax.Device`` will run, one of a described topology
    too."""
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)
