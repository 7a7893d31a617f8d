"""Parameters that are cut over devices, gathered for their use; their gradients are scattered."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxpt.mesh import Axes, active_layout


def gathered(x: jax.Array, stored: Axes, used: Axes) -> jax.Array:
    """A parameter of logical axes ``stored``, laid out by ``used``. Its gradient is laid out as the
    parameter is, so that what the devices add to it is summed where it is to lie (``constrain``
    would have all of it on every device)."""
    return _gathered(x, stored, used)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x, stored, used):
    return _laid_out(x, used)


def _gathered_forward(x, stored, used):
    return _laid_out(x, used), None


def _gathered_backward(stored, used, _, g):
    return (_laid_out(g, stored),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _laid_out(x: jax.Array, axes: Axes) -> jax.Array:
    layout = active_layout()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes))


_GATHERING: contextvars.ContextVar[bool] = contextvars.ContextVar("jaxpt_gathering", default=False)


@contextlib.contextmanager
def gathering() -> Iterator[None]:
    """While active, ``in_use`` gathers. For what the backward pass computes again: it would keep
    gathered matrices otherwise."""
    token = _GATHERING.set(True)
    try:
        yield
    finally:
        _GATHERING.reset(token)


def gathers() -> bool:
    """Whether parameters are cut along ``embed``."""
    layout = active_layout()
    return layout is not None and layout.ways("embed") > 1


def in_use(w: jax.Array, axes: Axes, dtype) -> jax.Array:
    """A parameter of these logical axes as it is used in ``dtype``: gathered along ``embed``, once
    for all uses (left to itself, XLA gathers it for each)."""
    if not _GATHERING.get() or not gathers():
        return w
    return gathered(narrowed(w, dtype), axes, tuple("width" if a == "embed" else a for a in axes))


def narrowed(w: jax.Array, dtype) -> jax.Array:
    """The same in ``dtype`` where that is smaller: so that less is sent."""
    return w.astype(dtype) if jnp.dtype(dtype).itemsize < w.dtype.itemsize else w
