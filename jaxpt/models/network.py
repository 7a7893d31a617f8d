"""The whole network: embedding, stacks, output."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

import kernels.attention as kernel
from jaxpt.models.attention import Rule, sharding_layout
from jaxpt.models.cache import Cache
from jaxpt.models.lookup import embedded, lookup
from jaxpt.models.mlp import ACTIVATIONS, dropout, project, projection
from jaxpt.models.position import (
    ALiBi,
    BiasTable,
    Learned,
    PositionTable,
    RelativeBias,
    Rotary,
    rotary_angles,
)
from jaxpt.models.stack import Context, Layers, rows
from jaxpt.models.transformer import Transformer
from jaxpt.weights.base import Scope
from jaxpt.weights.init import Constant, FanIn, Normal

Batch = dict[str, jax.Array]


class Table(nnx.Module):
    """Rows to look up, [rows, D]."""

    def __init__(self, scope: Scope, rows: int, width: int, axes, init):
        self.w = scope.param("w", (rows, width), axes, init, kind="embedding")


class Stack(Layers):
    """Positions, layers and final norm of an encoder or a decoder.

    Where ``like`` is given, learned positions and the embedding's norm are that stack's own.
    """

    def __init__(
        self,
        config: Transformer,
        scope: Scope,
        depth: int,
        *,
        encoder: bool,
        like: Stack | None = None,
    ):
        cross = config.kind == "encoder_decoder" and not encoder
        super().__init__(config, scope, depth, cross=cross)
        positions, width, embedded = config.positions, config.width, config.width_of_embedding
        if isinstance(positions, Learned):
            at, columns = scope / "positions", config.width_of_positions
            self.positions = like.positions if like else PositionTable(positions, at, columns)
        if isinstance(positions, RelativeBias) and not positions.per_layer:
            heads = config.attention.heads
            self.relative_bias = BiasTable(
                positions, scope / "relative_bias", heads, width, encoder
            )
        if config.embedding_norm:
            at = scope / "embedding_norm"
            self.embedding_norm = like.embedding_norm if like else config.norm.build(at, embedded)
        if embedded != width:
            axes = (None, "embed")
            bias = not config.projects_out
            projection(self, scope, "embedding_projection", embedded, width, axes, bias=bias)
        if config.has_final_norm:
            self.final_norm = config.norm.build(scope / "final_norm", width)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        rule: Rule,
        *,
        key: jax.Array | None = None,
        cross_rule: Rule | None = None,
        encoded: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        config = self.config
        if config.projects_out:
            x_BTD = project(self, "embedding_projection", x_BTD)
        if isinstance(config.positions, Learned):
            x_BTD = x_BTD + self.positions(positions_BT, x_BTD.dtype)
        if config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        keys = (None, None) if key is None or not config.has_dropout else jax.random.split(key)
        x_BTD = dropout(x_BTD, config.dropout, keys[0])
        if config.width_of_embedding != config.width and not config.projects_out:
            x_BTD = project(self, "embedding_projection", x_BTD)
        angles = local_angles = None
        if isinstance(config.positions, Rotary):
            rotary, length = config.positions, x_BTD.shape[1] if cache is None else cache.length
            angles = rotary_angles(positions_BT, rotary, config.head_dim, length)
            if rotary.local is not None:
                local_angles = rotary_angles(positions_BT, rotary.local, config.head_dim, length)
        bias = self._bias()
        layout = sharding_layout()
        ring = layout is not None and layout.ring and layout.ways("length") > 1
        if cache is None and not ring:  # a ring makes each part of the bias where it is used
            length, implementation = x_BTD.shape[1], config.attention.implementation
            sharded = layout is not None
            bias = kernel.shared_bias(bias, length, length, implementation, sharded=sharded)
        context = Context(rule, angles, bias, cross_rule, encoded, local_angles)
        x_BTD, cache = self.run(x_BTD, context, keys[1], cache)
        x_BTD = self.final_norm(x_BTD) if config.has_final_norm else x_BTD
        return rows(x_BTD, "length", "states"), cache

    def _bias(self):
        positions = self.config.positions
        if isinstance(positions, RelativeBias) and not positions.per_layer:
            return self.relative_bias()
        if isinstance(positions, ALiBi):
            return kernel.ALiBi(jnp.asarray(kernel.alibi_slopes(self.config.attention.heads)))
        return None


class Network(nnx.Module):
    """What an objective sees: hidden states, the output projection, and cached decoding.

    Where ``like`` is given, the embeddings (of tokens, types and positions, and their norm) are
    that network's own.
    """

    def __init__(
        self, config: Transformer, vocab_size: int, scope: Scope, like: Network | None = None
    ):
        self.config, self.vocab_size = config, vocab_size
        width, rows = config.width_of_embedding, config.padded_vocab(vocab_size)
        at, axes, init = scope / "embedding", ("vocab", "embed"), Normal(config.std_of_embedding)
        self.embedding = like.embedding if like else Table(at, rows, width, axes, init)
        if config.token_types:
            at, types, axes = scope / "token_types", config.token_types, (None, "embed")
            table = like.token_types if like else Table(at, types, width, axes, Normal(0.02))
            self.token_types = table
        if config.inner_positions:
            at, axes = scope / "inner_positions", (None, "embed")
            self.inner_positions = Table(at, config.inner_positions, width, axes, Normal(0.02))
        if config.depth_of_encoder:
            self.encoder = self._stack("encoder", scope, like)
        if config.depth_of_decoder:
            self.decoder = self._stack("decoder", scope, like)
        self._make_output(scope)

    def _stack(self, name: str, scope: Scope, like: Network | None) -> Stack:
        config, encoder = self.config, name == "encoder"
        depth = config.depth_of_encoder if encoder else config.depth_of_decoder
        return Stack(config, scope / name, depth, encoder=encoder, like=getattr(like, name, None))

    def _make_output(self, scope: Scope) -> None:
        """What comes after the stack."""
        config, width = self.config, self.config.width_of_output
        if config.head_transform:
            axes, bias = ("embed", None), config.head_transform_bias
            projection(self, scope, "transform", config.width, width, axes, bias=bias)
            self.transform_norm = config.norm.build(scope / "transform_norm", width)
        if config.projects_out:
            axes = ("embed", None)
            projection(self, scope, "output_projection", config.width, width, axes, bias=False)
        rows = config.padded_vocab(self.vocab_size)
        if not config.tied:
            self.lm_head = scope.weight("lm_head", width, rows, ("embed", "vocab"), FanIn())
        if config.output_bias:
            self.lm_head_bias = scope.param(
                "lm_head_bias", (rows,), ("vocab",), Constant(0.0), kind="bias"
            )

    @property
    def softcap(self) -> float | None:
        """Bound of the logits' magnitude."""
        return self.config.logit_softcap

    @property
    def logit_scale(self) -> float:
        """Factor of the logits."""
        return self.config.logit_scale

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Final hidden states of the decoder or the only stack, [B, T, D] in the compute dtype.

        Args:
          batch: tokens int32 [B, T], and where they matter segments, positions, prefix [B, T];
            for an encoder-decoder inputs [B, S], input_segments, input_positions; where the model
            has a table of them, inner_positions [B, T] (default 0).
          key: of dropout; None for none.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        tokens, segments = batch["tokens"], batch.get("segments")
        positions = _positions(batch.get("positions"), tokens)
        x = self._embed(tokens, batch.get("inner_positions"))
        if self.config.kind == "encoder":
            x, _ = self.encoder(x, positions, Rule(segments=segments), key=keys[0])
            return self._output(x)
        rule = Rule(causal=True, segments=segments, prefix=batch.get("prefix"))
        cross_rule = encoded = None
        if self.config.kind == "encoder_decoder":
            encoded = self.encode(batch, keys[1])
            cross_rule = Rule(segments=segments, kv_segments=batch.get("input_segments"))
        x, _ = self.decoder(x, positions, rule, key=keys[0], cross_rule=cross_rule, encoded=encoded)
        return self._output(x)

    def encode(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """The encoder's output [B, S, D] for ``inputs`` [B, S] of an encoder-decoder's batch."""
        inputs = batch["inputs"]
        positions = _positions(batch.get("input_positions"), inputs)
        rule = Rule(segments=batch.get("input_segments"))
        return self.encoder(self._embed(inputs), positions, rule, key=key)[0]

    def head(self) -> tuple[jax.Array, jax.Array | None]:
        """The output projection [D, V] and its bias [V] or None, in the parameters' dtype.

        V is the padded vocabulary.
        """
        w_DV = self.embedding.w[...].T if self.config.tied else self.lm_head.dense()
        return w_DV, self.lm_head_bias[...] if self.config.output_bias else None

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 [..., V], V the vocabulary without its padding."""
        w_DV, bias_V = self.head()
        y = jnp.dot(x_BTD, w_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
        y = y * self.logit_scale
        y = y if bias_V is None else y + bias_V
        if self.softcap is not None:
            y = self.softcap * jnp.tanh(y / self.softcap)
        return y[..., : self.vocab_size]

    def init_cache(
        self,
        batch_size: int,
        length: int,
        dtype=None,
        *,
        encoded: jax.Array | None = None,
        input_segments: jax.Array | None = None,
    ) -> Cache:
        """A cache for rows of up to ``length`` tokens (what is beyond is lost, without a word).

        Args:
          dtype: of keys and values; None: the compute dtype.
          encoded: [B, S, D], ``encode``'s; an encoder-decoder needs it. The keys and values of
            cross-attention are computed here, once.
          input_segments: int32 [B, S]; None: all of segment 1.
        """
        config = self.config
        dtype = config.compute_dtype() if dtype is None else dtype
        if config.kind == "encoder":
            raise ValueError("a model of kind encoder does not decode")
        heads = config.attention.groups(), config.head_dim
        cache = Cache.empty(config.layers, batch_size, length, *heads, dtype)
        if config.kind == "decoder":
            return cache
        if encoded is None:
            raise ValueError("an encoder_decoder's cache needs `encoded`")
        keys, values = self.decoder.cross_keys_values(encoded)
        if input_segments is None:
            input_segments = jnp.ones(encoded.shape[:2], jnp.int32)
        return dataclasses.replace(
            cache,
            cross_keys=keys.astype(dtype),
            cross_values=values.astype(dtype),
            cross_segments=input_segments,
        )

    def decode(
        self,
        tokens_BT: jax.Array,
        cache: Cache,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        prefix: jax.Array | None = None,
        inner_positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Hidden states of the next T tokens of each row, and the cache with them in it.

        Args:
          tokens_BT: int32; a whole prompt, or one token a row.
          segments: int32 [B, T], default all 1. Tokens of segment 0 at a row's end are padding:
            the row's next token takes their place.
          positions: int32 [B, T], for rotary and learned positions; default the index in the row.
          prefix: int32 [B, T], 1 where earlier tokens (of this call) see it too; default 0.
          inner_positions: int32 [B, T], where the model has a table of them; default 0.

        Returns:
          x_BTD in the compute dtype, and the new cache.
        """
        if segments is None:
            segments = jnp.ones_like(tokens_BT)
        if prefix is None:
            prefix = jnp.zeros_like(tokens_BT)
        rows = cache.rows(tokens_BT.shape[1])
        cache = cache.extended(segments, prefix)
        rule = Rule(
            causal=True,
            segments=segments,
            kv_segments=cache.segments,
            prefix=cache.prefix,
            positions=rows,
        )
        cross_rule = None
        if cache.cross_segments is not None:
            cross_rule = Rule(segments=segments, kv_segments=cache.cross_segments)
        x = self._embed(tokens_BT, inner_positions)
        positions = rows if positions is None else positions
        x, new = self.decoder(x, positions, rule, cross_rule=cross_rule, cache=cache)
        assert new is not None
        return self._output(x), new

    def _embed(self, tokens: jax.Array, inner: jax.Array | None = None) -> jax.Array:
        config = self.config
        if inner is not None and not config.inner_positions:
            raise ValueError("the model has no table for inner_positions: set inner_positions")
        x = embedded(self.embedding.w[...], tokens, config.compute_dtype())
        if config.scale_embeddings:
            x = x * math.sqrt(config.width_of_embedding)
        if config.token_types:
            x = x + self.token_types.w[...][0].astype(x.dtype)
        if config.inner_positions:
            table = self.inner_positions.w[...]
            x = x + (table[0] if inner is None else lookup(table, inner)).astype(x.dtype)
        return rows(x, "residual", "embedding")

    def _output(self, x: jax.Array) -> jax.Array:
        if self.config.projects_out:
            return project(self, "output_projection", x)
        if not self.config.head_transform:
            return x
        activation = ACTIVATIONS[self.config.mlp.activation]
        return self.transform_norm(activation(project(self, "transform", x)))


def _positions(positions: jax.Array | None, tokens: jax.Array) -> jax.Array:
    if positions is not None:
        return positions
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
