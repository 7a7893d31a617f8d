"""The attention op over a mesh of devices: each works on its own rows, heads and queries.

The TPU kernels are opaque to XLA's partitioner, which cannot cut them; here each device calls the
op on its own part, under ``jax.shard_map``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.attention import api
from kernels.attention.bias import ALiBi, RelativeBias

Axes = str | tuple[str, ...] | None
ROWS = ("segments", "kv_segments", "prefix", "positions", "kv_positions")
OF_QUERIES = ("segments", "positions")


@dataclasses.dataclass(frozen=True)
class Split:
    """Mesh axes over which batch, heads and the queries' length are cut; None: not at all.

    ``length`` (context parallelism) cuts the queries, and each device sees all keys: they are
    gathered where they come cut. It needs positions, which "pallas_tpu" serves without a bias.
    """

    batch: Axes = None
    heads: Axes = None
    length: Axes = None

    def size(self, mesh: Mesh, name: str) -> int:
        axes = getattr(self, name)
        axes = (axes,) if isinstance(axes, str) else axes or ()
        size = 1
        for axis in axes:
            size *= mesh.shape[axis]
        return size


def sharded_attention(q_BTNH, k_BSKH, v_BSKH, *, mesh: Mesh, split: Split, **arguments):
    """``attention`` with the same arguments and result, cut over ``mesh`` as ``split`` says.

    Raises:
      ValueError: a size that the mesh does not divide.
      NotImplementedError: dropout.
    """
    bias = arguments.pop("bias", None)
    if arguments.get("dropout") is not None:
        raise NotImplementedError("dropout is not served over a mesh")
    batch, queries, heads, _ = q_BTNH.shape
    groups, cut = k_BSKH.shape[2], split.size(mesh, "heads")
    for name, size, axis in (
        ("batch", batch, "batch"), ("heads", heads, "heads"), ("length", queries, "length")
    ):  # fmt: skip
        if size % split.size(mesh, axis):
            raise ValueError(f"{name} {size} is not a multiple of {split.size(mesh, axis)} devices")
    if groups % cut:  # too few key heads for the devices: each gets those that its queries need
        repeats = heads // groups
        k_BSKH, v_BSKH = (jnp.repeat(x, repeats, axis=2) for x in (k_BSKH, v_BSKH))
    rows = {name: arguments.pop(name, None) for name in ROWS}
    if rows["segments"] is not None and rows["kv_segments"] is None:
        rows["kv_segments"] = rows["segments"]
    if split.size(mesh, "length") > 1:
        for name, length in (("positions", queries), ("kv_positions", k_BSKH.shape[1])):
            if rows[name] is None:
                rows[name] = jnp.arange(length, dtype=jnp.int32)
    rows = {name: x for name, x in rows.items() if x is not None}
    rows = {  # positions of all rows at once become those of each
        name: jnp.broadcast_to(x, (batch, x.shape[-1])) for name, x in rows.items()
    }
    query = P(split.batch, split.length, split.heads)
    key = P(split.batch, None, split.heads)
    row_specs = {
        name: P(split.batch, split.length if name in OF_QUERIES else None) for name in rows
    }
    if bias is None or isinstance(bias, RelativeBias | ALiBi):
        bias_spec: Any = jax.tree.map(lambda _: P(split.heads), bias)
    else:  # an array is cut along the axes along which it is not spread
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        axes = (split.batch, split.heads, split.length, None)
        bias_spec = P(*(None if n == 1 else a for n, a in zip(bias.shape, axes, strict=True)))

    def local(q, k, v, bias, rows):
        return api.attention(q, k, v, bias=bias, **rows, **arguments)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(query, key, key, bias_spec, row_specs),
        out_specs=query,
        check_vma=False,  # kernels do not say over what their results vary
    )(q_BTNH, k_BSKH, v_BSKH, bias, rows)
