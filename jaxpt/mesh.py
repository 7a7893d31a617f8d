"""The device mesh, and the one table from logical axes to mesh axes.

Parameters and activations name *logical* axes; ``RULES`` says on which mesh axes each lies.
A ``Layout`` (a mesh and its table) is active while a program is traced, so that model code
says only ``constrain(x, "batch", "length", "width", name="...")``.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpt.errors import ConfigError
from jaxpt.paths import known, matches
from kernels.platform import compiling_for

MESH_AXES = ("replica", "data", "fsdp", "tensor", "context")

# Logical axes of *parameters* and *activations* to mesh axes. `embed` is the width axis of a
# parameter (sharded by fsdp, gathered where it is used); `width` is that of an activation.
# `residual` are the positions of what lies between a layer's branches, `length` those within them.
Table = tuple[tuple[str, tuple[str, ...]], ...]
RULES: Table = (
    ("batch", ("replica", "data", "fsdp")),
    ("length", ("context",)),
    ("residual", ("context",)),
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
class Placement:
    """Rules of their own for the parameters whose paths match ``pattern``, and for what the
    optimizer keeps of them; the first placement to match wins."""

    pattern: str  # which parameters, shell-style over their paths, as for parameter groups
    rules: Table  # (logical axis, mesh axes) pairs that override the mesh's for these

    def __post_init__(self):
        _check_rules(self.rules)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A device mesh and the table that lays logical axes on it. Use as a context manager.

    placements: rules of some parameters' own. ring, shard_state: as in ``Mesh``.
    """

    mesh: jax.sharding.Mesh
    rules: Table = RULES
    placements: tuple[Placement, ...] = ()
    ring: bool = False
    shard_state: bool = False

    def spec(
        self, axes: Axes, shape: tuple[int, ...] | None = None, path: str | None = None
    ) -> PartitionSpec:
        """The partition of an array with these logical axes.

        Args:
          shape: of the array, where its sizes are to be held against the mesh.
          path: of the parameter that the array is (or belongs to), whose rules may be its own.

        Raises:
          ConfigError: an unknown logical axis, or (where ``shape`` is given) a dimension that
            its mesh axes do not divide.
        """
        table = dict(self.rules)
        if path is not None:
            own = next((p.rules for p in self.placements if matches(p.pattern, path)), ())
            table |= dict(own)
        entries: list[tuple[str, ...]] = []
        for i, axis in enumerate(axes):
            if axis is not None and axis not in table:
                raise ConfigError(
                    "mesh.rules", f"no rule for logical axis {axis!r}; known: {', '.join(table)}"
                )
            used = {name for names in entries for name in names}
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
            entries.append(names)
        return _partition(entries)

    def sharding(
        self, axes: Axes, shape: tuple[int, ...] | None = None, path: str | None = None
    ) -> NamedSharding:
        """Where such an array lies; see ``spec``."""
        return NamedSharding(self.mesh, self.spec(axes, shape, path))

    def spread(self, sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
        """The same, cut also over those of data and fsdp that it is not cut over, each along the
        longest dimension that it divides: of several as long, the last."""
        entries = [_names(entry) for entry in (*sharding.spec, *(None,) * len(shape))][: len(shape)]
        local = list(sharding.shard_shape(shape))
        for name in ("data", "fsdp"):
            size = self.mesh.shape[name]
            fitting = [i for i, n in enumerate(local) if n % size == 0]
            if size == 1 or not fitting or any(name in entry for entry in entries):
                continue
            at = max(fitting, key=lambda i: (local[i], i))
            entries[at] = (*entries[at], name)
            local[at] //= size
        return NamedSharding(self.mesh, _partition(entries))

    def ways(self, axis: str) -> int:
        """Over how many devices a logical axis is cut."""
        return math.prod(self.mesh.shape[n] for n in dict(self.rules)[axis])

    def check_placements(self, paths: Iterable[str]) -> None:
        """Raises ConfigError where a placement's pattern matches none of a model's parameters."""
        for i, placement in enumerate(self.placements):
            if not any(matches(placement.pattern, path) for path in paths):
                raise ConfigError(
                    f"mesh.placements.{i}.pattern",
                    f"{placement.pattern!r} matches no parameter; known: {known(paths)}",
                )

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


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One dimension's entry of a PartitionSpec as a tuple."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _partition(entries: Iterable[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(
        *(None if not names else names[0] if len(names) == 1 else names for names in entries)
    )


@dataclasses.dataclass(frozen=True)
class Activation:
    """What ``constrain`` was asked: the array's name, logical axes, shape and type, and where it
    lies by the active layout. Within a scan, of one layer."""

    name: str
    axes: Axes
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec


_ACTIVE: contextvars.ContextVar[Layout | None] = contextvars.ContextVar(
    "jaxpt_layout", default=None
)
_SEEN: contextvars.ContextVar[dict[Activation, None] | None] = contextvars.ContextVar(
    "jaxpt_activations", default=None
)


def active_layout() -> Layout | None:
    return _ACTIVE.get()


@contextlib.contextmanager
def recorded() -> Iterator[dict[Activation, None]]:
    """The activations that ``constrain`` lays out while this is active, each once, in order."""
    found: dict[Activation, None] = {}
    token = _SEEN.set(found)
    try:
        yield found
    finally:
        _SEEN.reset(token)


def constrain(x: jax.Array, *axes: str | None, name: str) -> jax.Array:
    """Lay ``x`` out by its logical axes, one per dimension.

    Args:
      name: what ``jaxpt train --dry-run`` calls it.

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
    seen = _SEEN.get()
    if seen is not None:
        seen[Activation(name, axes, x.shape, str(x.dtype), layout.spec(axes))] = None
    if layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes))


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left."""

    # copies of the parameters on slices or nodes of their own, over which the batch is cut: through
    # the network between them go gradients alone
    replica: int = 1
    data: int = -1  # copies of the parameters; the batch is cut over them
    fsdp: int = 1  # the batch is cut over it, and so are parameters, gathered where they are used
    tensor: int = 1  # heads, MLP width and vocabulary are cut over it
    context: int = 1  # sequence positions are cut over it
    devices: int | None = None  # how many devices to use, the first ones; None: all there are
    # (logical axis, mesh axes) pairs that override the table
    rules: Table = ()
    placements: tuple[Placement, ...] = ()  # rules of some parameters' own, by path
    # whether norms and residuals are cut over tensor too, along the positions (Korthikanti et al.
    # 2022, section 4.2.2: sequence parallelism)
    sequence: bool = False
    # whether, in attention, keys go round the devices of context (Liu et al. 2023: ring attention);
    # else each gathers all of them
    ring: bool = False
    # whether the optimizer's state is cut over data and fsdp even where the parameters are not
    # (Rajbhandari et al. 2020, section 5.1: ZeRO, stage 1)
    shard_state: bool = False

    def __post_init__(self):
        sizes = [getattr(self, a) for a in MESH_AXES]
        if sizes.count(-1) > 1:
            raise ConfigError("data", "only one mesh axis may be -1")
        for axis, size in zip(MESH_AXES, sizes, strict=True):
            if size != -1 and size < 1:
                raise ConfigError(
                    axis, f"{size} is not valid; give a size >= 1, or -1 for what is left"
                )
        _check_rules(self.rules)

    @property
    def table(self) -> dict[str, tuple[str, ...]]:
        """Logical axis -> mesh axes."""
        table = dict(RULES) | dict(self.rules)
        if self.sequence:
            extra = [name for name in table["heads"] if name not in table["residual"]]
            table["residual"] = (*table["residual"], *extra)
        return table

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
        """The layout on the given devices (default: all).

        Raises:
          ConfigError: sizes that do not fit, or a replica that would lie across slices or nodes.
        """
        given = list(jax.devices() if devices is None else devices)
        sizes = self.sizes(len(given))
        used = given[: math.prod(sizes)]
        grid = _grid(used, sizes, whole=len(used) == len(given))
        mesh = jax.sharding.Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
        table = tuple(self.table.items())
        return Layout(mesh, table, self.placements, self.ring, self.shard_state)


def _check_rules(rules: Table) -> None:
    """Raises ConfigError where a rule names an axis that there is not."""
    logical_axes = dict(RULES)
    for logical, names in rules:
        if logical not in logical_axes:
            raise ConfigError(
                "rules", f"unknown logical axis {logical!r}; known: {', '.join(logical_axes)}"
            )
        for name in names:
            if name not in MESH_AXES:
                raise ConfigError(
                    "rules", f"unknown mesh axis {name!r}; known: {', '.join(MESH_AXES)}"
                )


def _grid(devices: list, sizes: tuple[int, ...], *, whole: bool) -> np.ndarray:
    """The devices as an array of these sizes. Those of a replica are neighbours: of one slice, or
    else of one node, wherever it fits there.

    Args:
      whole: whether these are all the devices of their slices.
    """
    key = _granule(devices)
    devices = sorted(devices, key=key)  # stable
    blocks = np.array(devices).reshape(sizes[0], -1)
    held = collections.Counter(map(key, devices))
    for block in blocks:
        within = {key(device) for device in block}
        if len(within) > 1 and sum(held[each] for each in within) != len(block):
            raise ConfigError(
                "mesh.replica",
                f"{sizes[0]} replicas of {len(block)} devices would cut through slices or nodes, "
                f"of which there are {len(held)}",
            )
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if devices[0].platform == "tpu" and whole and len(slices) == len(blocks):
        # As the chips are wired.
        return np.stack(
            [
                mesh_utils.create_device_mesh(
                    sizes[1:], list(block), allow_split_physical_axes=True
                )
                for block in blocks
            ]
        )
    return blocks.reshape(sizes)


def _granule(devices: list):
    """What devices with a fast network between them have in common: their slice where there are
    several, else their process."""
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return lambda device: device.slice_index
    return lambda device: device.process_index


def single() -> Layout:
    """A layout of one device, for notebooks and tests."""
    return Mesh(data=1).build(jax.devices()[:1])
