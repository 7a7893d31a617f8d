"""The attention op over a mesh of devices: each works on its own rows, heads and queries.

The TPU kernels are opaque to XLA's partitioner, which cannot cut them; here each device calls the
op on its own part, under ``jax.shard_map``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.attention import api, gpu, tpu, xla
from kernels.attention.bias import ALiBi, RelativeBias
from kernels.attention.dropout import Dropout, drawn
from kernels.attention.ring import Ring
from kernels.attention.ring import attention as ring_attention
from kernels.attention.rule import Consecutive, row_indices

Axes = str | tuple[str, ...] | None
ROWS = ("segments", "kv_segments", "prefix", "positions", "kv_positions")
OF_QUERIES = ("segments", "positions")
PREPARE = {
    "xla": xla.prepared,
    "pallas_tpu": tpu.prepared,
    "pallas_gpu": gpu.prepared,
    "pallas_tpu_interpret": functools.partial(tpu.prepared, interpret=True),
    "pallas_gpu_interpret": functools.partial(gpu.prepared, interpret=True),
}


@dataclasses.dataclass(frozen=True)
class Split:
    """Mesh axes over which batch, heads and the queries' length are cut; None: not at all.

    ``length`` (context parallelism) cuts the queries. Each device sees all keys, gathered where
    they come cut, or, with ``ring``, its share of them at a time, which then go round: the memory
    of keys is that of the share, and in causal order the first device waits for the last.
    "pallas_tpu" takes a bias where the share of a row is a multiple of 128.
    """

    batch: Axes = None
    heads: Axes = None
    length: Axes = None
    ring: bool = False

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
      NotImplementedError: with ``ring``, a bias that is an array, and a second derivative.
    """
    bias, dropout = arguments.pop("bias", None), arguments.pop("dropout", None)
    ring = split.ring and split.size(mesh, "length") > 1
    batch, queries, heads, _ = q_BTNH.shape
    groups, cut = k_BSKH.shape[2], split.size(mesh, "heads")
    keys = k_BSKH.shape[1]
    for name, size, axis in (
        ("batch", batch, "batch"), ("heads", heads, "heads"), ("length", queries, "length"),
        ("length of keys", keys if ring else 0, "length"),
    ):  # fmt: skip
        if size % split.size(mesh, axis):
            raise ValueError(f"{name} {size} is not a multiple of {split.size(mesh, axis)} devices")
    if groups % cut:  # too few key heads for the devices: each gets those that its queries need
        repeats = heads // groups
        k_BSKH, v_BSKH = (jnp.repeat(x, repeats, axis=2) for x in (k_BSKH, v_BSKH))
    rows = {name: arguments.pop(name, None) for name in ROWS}
    if rows["segments"] is not None and rows["kv_segments"] is None:
        rows["kv_segments"] = rows["segments"]
    for name, length in (("positions", queries), ("kv_positions", keys)):
        if rows[name] is not None:
            rows[name] = row_indices(rows[name], length)
    rows = {  # positions of all rows at once become those of each
        name: jnp.broadcast_to(x, (batch, x.shape[-1])) for name, x in rows.items() if x is not None
    }
    if dropout is not None and not isinstance(dropout, Dropout):
        rate, seed = dropout
        dropout = drawn(rate, seed, batch, heads, queries, keys)
    of_keys = split.length if ring else None
    query = P(split.batch, split.length, split.heads)
    key = P(split.batch, of_keys, split.heads)
    row_specs = {
        name: P(split.batch, split.length if name in OF_QUERIES else of_keys) for name in rows
    }
    ends = (P(split.batch, split.heads, axis) for axis in (split.length, of_keys))
    drop_spec = None if dropout is None else Dropout(dropout.rate, *ends)  # type: ignore
    if bias is None or isinstance(bias, RelativeBias | ALiBi):
        bias_spec: Any = jax.tree.map(lambda _: P(split.heads), bias)
    elif ring:
        raise NotImplementedError("bias (an array): a ring of devices does not serve it")
    else:  # an array is cut along the axes along which it is not spread
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        axes = (split.batch, split.heads, split.length, None)
        bias_spec = P(*(None if n == 1 else a for n, a in zip(bias.shape, axes, strict=True)))

    def local(q, k, v, bias, rows, dropout):
        if ring:
            return _round(mesh, split, arguments, q, k, v, bias, rows, dropout)
        if split.size(mesh, "length") > 1 and "positions" not in rows:
            part = q.shape[1]
            rows["positions"] = Consecutive(jax.lax.axis_index(split.length) * part, part)
        return api.attention(q, k, v, bias=bias, dropout=dropout, **rows, **arguments)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(query, key, key, bias_spec, row_specs, drop_spec),
        out_specs=query,
        check_vma=False,  # kernels do not say over what their results vary
    )(q_BTNH, k_BSKH, v_BSKH, bias, rows, dropout)


def _round(mesh: Mesh, split: Split, arguments: dict, q, k, v, bias, rows, dropout):
    """What one device does of a ring."""
    options = dict.fromkeys(("window", "softcap")) | {"causal": False} | arguments
    implementation = options.pop("implementation", None)
    scale = options.pop("scale", None)
    options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    asked: dict[str, Any] = dict.fromkeys(ROWS) | rows | options
    names = ("causal", "prefix", "segments", "kv_segments", "window")
    api.check(q, k, v, *(asked[name] for name in names))
    for place, x in (("positions", q), ("kv_positions", k)):
        if asked[place] is None:
            asked[place] = Consecutive(0, x.shape[1])  # as those of the parts are
    asked |= {"bias": bias, "dropout": dropout}
    name = implementation or api.fastest(q, k, v, asked)
    if name not in PREPARE:
        raise NotImplementedError(f"implementation={name!r}: a ring of devices does not serve it")
    found = Ring(
        split.length, split.size(mesh, "length"), PREPARE[name], tuple(sorted(options.items()))
    )
    return ring_attention(found, q, k, v, bias, rows, dropout)
