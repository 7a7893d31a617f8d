"""The device mesh, and the one table from logical axes to mesh axes.

Parameters and activations name *logical* axes; ``RULES`` says on which mesh axes each lies.
A ``Layout`` (a mesh and its table) is active while a program is traced, so that model code
says only ``constrain(x, "batch", "length", "embed")``.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpt.errors import ConfigError
from kernels.platform import compiling_for

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axes of *parameters* and *activations* to mesh axes. `embed` is the width axis of a
# parameter (sharded by fsdp, gathered where it is used); `width` is that of an activation.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", ("context",)),
    ("width", ()),
    ("embed", ("fsdp",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("head_dim", ()),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("layers", ()),
    ("rank", ()),
    ("expert", ()),
    ("positions", ()),
    ("buckets", ()),
)

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A device mesh and the table that lays logical axes on it. Use as a context manager."""

    mesh: jax.sharding.Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES

    def spec(self, axes: Axes, shape: tuple[int, ...] | None = None) -> PartitionSpec:
        """The partition of an array with these logical axes.

        Raises:
          ConfigError: an unknown logical axis, or (where ``shape`` is given) a dimension that
            its mesh axes do not divide.
        """
        table = dict(self.rules)
        entries: list[str | tuple[str, ...] | None] = []
        used: set[str] = set()
        for i, axis in enumerate(axes):
            if axis is not None and axis not in table:
                raise ConfigError(
                    "mesh.rules", f"no rule for logical axis {axis!r}; known: {', '.join(table)}"
                )
            names = tuple(
                n for n in (table[axis] if axis else ()) if n not in used and self.mesh.shape[n] > 1
            )
            ways = math.prod(self.mesh.shape[n] for n in names)
            if shape is not None and shape[i] % ways:
                raise ConfigError(
                    "mesh",
                    f"dimension {i} ({axis}) of an array of shape {shape} is {shape[i]}, which "
                    f"{' x '.join(names)} = {ways} does not divide",
                )
            used.update(names)
            entries.append(None if not names else names[0] if len(names) == 1 else names)
        return PartitionSpec(*entries)

    def sharding(self, axes: Axes, shape: tuple[int, ...] | None = None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def ways(self, axis: str) -> int:
        """Over how many devices a logical axis is cut."""
        return math.prod(self.mesh.shape[n] for n in dict(self.rules)[axis])

    @contextlib.contextmanager
    def active(self):
        """While active, ``constrain`` and the sharded kernels use this layout, and what is chosen
        by platform is chosen for its devices."""
        token = _ACTIVE.set(self)
        try:
            with compiling_for(self.mesh.devices.flat[0], self.mesh.size):
                yield self
        finally:
            _ACTIVE.reset(token)


_ACTIVE: contextvars.ContextVar[Layout | None] = contextvars.ContextVar(
    "jaxpt_layout", default=None
)


def active_layout() -> Layout | None:
    return _ACTIVE.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay ``x`` out by its logical axes, one per dimension.

    Raises:
      RuntimeError: no layout is active although there are several devices. (A constraint that
        quietly does nothing is how sharding bugs hide.)
    """
    layout = _ACTIVE.get()
    if layout is None:
        if jax.device_count() == 1:
            return x
        raise RuntimeError(
            f"{jax.device_count()} devices and no layout: wrap the call in "
            "`with jaxpt.mesh.Mesh().build().active():` (or jaxpt.mesh.single() for one device)"
        )
    if layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes))


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left."""

    data: int = -1  # copies of the parameters; the batch is cut over them
    fsdp: int = 1  # the batch is cut over it, and so are parameters, gathered where they are used
    tensor: int = 1  # heads, MLP width and vocabulary are cut over it
    context: int = 1  # sequence positions are cut over it
    devices: int | None = None  # how many devices to use, the first ones; None: all there are
    # (logical axis, mesh axes) pairs that override the table
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self):
        sizes = [getattr(self, a) for a in MESH_AXES]
        if sizes.count(-1) > 1:
            raise ConfigError("data", "only one mesh axis may be -1")
        for axis, size in zip(MESH_AXES, sizes, strict=True):
            if size != -1 and size < 1:
                raise ConfigError(
                    axis, f"{size} is not valid; give a size >= 1, or -1 for what is left"
                )
        known = dict(RULES)
        for logical, names in self.rules:
            if logical not in known:
                raise ConfigError(
                    "rules", f"unknown logical axis {logical!r}; known: {', '.join(known)}"
                )
            for name in names:
                if name not in MESH_AXES:
                    raise ConfigError(
                        "rules", f"unknown mesh axis {name!r}; known: {', '.join(MESH_AXES)}"
                    )

    def sizes(self, devices: int) -> tuple[int, ...]:
        """The size of each of ``MESH_AXES`` where there are so many devices. Raises ConfigError if
        they do not fit."""
        if self.devices is not None:
            if not 1 <= self.devices <= devices:
                raise ConfigError(
                    "mesh.devices", f"{self.devices} is not valid; there are {devices}"
                )
            devices = self.devices
        sizes = [getattr(self, a) for a in MESH_AXES]
        fixed = math.prod(s for s in sizes if s != -1)
        if -1 in sizes:
            if devices % fixed:
                raise ConfigError(
                    "mesh",
                    f"{devices} devices cannot be cut into {fixed}, the product of the given sizes",
                )
            sizes[sizes.index(-1)] = devices // fixed
        elif fixed != devices:
            raise ConfigError(
                "mesh", f"{' x '.join(map(str, sizes))} = {fixed}, but there are {devices} devices"
            )
        return tuple(sizes)

    def build(self, devices=None) -> Layout:
        """The layout on the given devices (default: all)."""
        devices = np.array(jax.devices() if devices is None else devices)
        sizes = self.sizes(devices.size)
        devices = devices[: math.prod(sizes)]
        if jax.devices()[0].platform == "tpu" and devices.size == len(jax.devices()):
            mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
        else:
            mesh = jax.sharding.Mesh(
                devices.reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
            )
        table = dict(RULES) | dict(self.rules)
        return Layout(mesh, tuple(table.items()))


def single() -> Layout:
    """A layout of one device, for notebooks and tests."""
    return Mesh(data=1).build(jax.devices()[:1])
