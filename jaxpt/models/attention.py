"""The attention layer: projections around the op of ``kernels.attention``."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

import kernels.attention as kernel
from jaxpt.errors import ConfigError
from jaxpt.mesh import Layout, active_layout, constrain
from jaxpt.models.mlp import check_rate, project, projection
from jaxpt.models.norm import Norm
from jaxpt.models.position import rotate
from jaxpt.weights.base import Scope


@dataclasses.dataclass(frozen=True)
class Attention:
    """Softmax attention with N query heads and K key/value heads of width H."""

    heads: int = 8  # query heads N
    kv_heads: int | None = None  # key/value heads K, a divisor of heads; None: as many
    head_dim: int | None = None  # width H of a head; None: the model's width / heads
    bias: bool = False  # whether query, key, value and output projections have biases
    out_bias: bool | None = None  # whether the output projection has one; None: as bias (Qwen2: no)
    qk_norm: bool = False  # whether queries and keys go through the model's norm
    # whether that norm is of all heads' channels together (OLMo 2), not of each head's by itself
    qk_norm_whole: bool = False
    scale: float | None = None  # of the scores; None: head_dim^-0.5 (T5 has 1)
    softcap: float | None = None  # bounds the scores by its magnitude; None: no bound
    window: tuple[
        int | None, ...
    ] = ()  # reach of self-attention, repeated over the layers: (64, None)
    dropout: float = 0.0  # rate on the probabilities
    implementation: str | None = None  # of the op; None: the fastest that serves

    def __post_init__(self):
        for field in ("heads", "kv_heads", "head_dim"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(field, f"{value} is not valid; give 1 or more")
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError("kv_heads", f"{self.kv_heads} must divide heads = {self.heads}")
        if self.qk_norm_whole and not self.qk_norm:
            raise ConfigError("qk_norm_whole", "there is no norm to be of the whole: set qk_norm")
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigError("softcap", f"{self.softcap} is not valid; it must be above 0")
        if any(w is not None and w < 1 for w in self.window):
            raise ConfigError("window", f"{self.window} is not valid; each is None or at least 1")
        check_rate("dropout", self.dropout)

    def groups(self) -> int:
        """The number of key/value heads, K."""
        return self.kv_heads or self.heads

    def width_of_head(self, width: int) -> int:
        """H for a model of this width. Raises ConfigError where it is not whole."""
        if self.head_dim is None and width % self.heads:
            raise ConfigError(
                "heads",
                f"{self.heads} does not divide the width {width}; change one, or set head_dim",
            )
        return self.head_dim or width // self.heads

    def window_of_layer(self, layer: int) -> int | None:
        return self.window[layer % len(self.window)] if self.window else None


@dataclasses.dataclass(frozen=True)
class Rule:
    """Who sees whom: the arguments of the attention op that say so."""

    causal: bool = False
    segments: jax.Array | None = None
    kv_segments: jax.Array | None = None
    prefix: jax.Array | None = None
    positions: jax.Array | None = None
    kv_positions: jax.Array | None = None

    def arguments(self) -> dict:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def sharding_layout() -> Layout | None:
    """The active layout where it is one of several devices, over which attention is cut."""
    layout = active_layout()
    return None if layout is None or layout.mesh.size == 1 else layout


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, **arguments) -> jax.Array:
    """The op, over the active layout: each device attends with its own rows, heads and queries,
    by the kernels, which XLA cannot cut. One query at a time is left to XLA."""
    layout = sharding_layout()
    if layout is None or q_BTNH.shape[1] == 1:
        return kernel.attention(q_BTNH, k_BSKH, v_BSKH, **arguments)
    batch, length, heads = layout.spec(("batch", "length", "heads"))
    split = kernel.Split(batch=batch, heads=heads, length=length, ring=layout.ring)
    return kernel.sharded_attention(
        q_BTNH, k_BSKH, v_BSKH, mesh=layout.mesh, split=split, **arguments
    )


class AttentionModule(nnx.Module):
    """Self-attention, or cross-attention where keys come from elsewhere."""

    def __init__(self, config: Attention, scope: Scope, width: int, norm: Norm):
        self.config, self.head_dim = config, config.width_of_head(width)
        queries, keys = config.heads * self.head_dim, config.groups() * self.head_dim
        projection(self, scope, "query", width, queries, ("embed", "heads"), bias=config.bias)
        projection(self, scope, "key", width, keys, ("embed", "kv_heads"), bias=config.bias)
        projection(self, scope, "value", width, keys, ("embed", "kv_heads"), bias=config.bias)
        bias = config.bias if config.out_bias is None else config.out_bias
        projection(self, scope, "out", queries, width, ("heads", "embed"), bias=bias)
        if config.qk_norm:
            whole = config.qk_norm_whole
            self.query_norm = norm.build(scope / "query_norm", queries if whole else self.head_dim)
            self.key_norm = norm.build(scope / "key_norm", keys if whole else self.head_dim)

    def queries(self, x_BTD: jax.Array, angles=None) -> jax.Array:
        """[B, T, N, H], rotated by ``angles`` where given."""
        return self._heads("query", x_BTD, angles, "heads")

    def keys_values(self, x_BSD: jax.Array, angles=None) -> tuple[jax.Array, jax.Array]:
        """Keys (rotated by ``angles`` where given) and values, each [B, S, K, H]."""
        return self._heads("key", x_BSD, angles, "kv_heads"), self._heads(
            "value", x_BSD, None, "kv_heads"
        )

    def _heads(self, name: str, x: jax.Array, angles, axis: str) -> jax.Array:
        y = project(self, name, x)
        norm = getattr(self, f"{name}_norm", None)
        if norm is not None and self.config.qk_norm_whole:
            y = norm(y)
        y = y.reshape(*y.shape[:-1], -1, self.head_dim)
        length = "length" if y.shape[1] > 1 else None
        y = constrain(y, "batch", length, axis, "head_dim", name=f"attention/{name}")
        if norm is not None and not self.config.qk_norm_whole:
            y = norm(y)
        return y if angles is None else rotate(y, angles)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, rule: Rule, *, bias=None, window=None, key=None):
        """[B, T, D], after the output projection."""
        rate = self.config.dropout
        y = attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            **rule.arguments(),
            bias=bias,
            window=window,
            softcap=self.config.softcap,
            scale=self.config.scale,
            dropout=None if key is None or rate == 0 else (rate, key),
            implementation=self.config.implementation,
        )
        return project(self, "out", y.reshape(*y.shape[:-2], -1))
