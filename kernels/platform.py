"""Which platform the program that is being traced is for: that of JAX, unless it is compiled ahead
of time for another."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

# (device, how many of them)
_target: contextvars.ContextVar[tuple[Any, int] | None] = contextvars.ContextVar(
    "kernels_target", default=None
)


def platform() -> str:
    """One of cpu, gpu and tpu."""
    target = _target.get()
    return jax.default_backend() if target is None else target[0].platform


def device() -> Any:
    """One of the devices, as JAX describes it."""
    target = _target.get()
    return jax.devices()[0] if target is None else target[0]


def devices() -> int:
    """How many devices the program is for."""
    target = _target.get()
    return jax.device_count() if target is None else target[1]


def on_one_device() -> bool:
    """Whether what is traced runs on one device: there is no other, or this is a shard_map. XLA
    cannot cut a kernel over several."""
    return devices() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual


@contextlib.contextmanager
def compiling_for(device: Any, devices: int = 1) -> Iterator[None]:
    """While a program is traced that so many of this ``jax.Device`` will run, one of a described
    topology too."""
    token = _target.set((device, devices))
    try:
        yield
    finally:
        _target.reset(token)
