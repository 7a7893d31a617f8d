"""What decoding remembers: keys and values of the tokens so far, and which tokens those were."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer of a decoder; a pytree, for B rows of up to S tokens.

    Token t of a row lies at index t of its row, whatever else is in the batch: rows may be of
    different lengths.
    """

    keys: jax.Array  # [L, B, S, K, H]
    values: jax.Array  # [L, B, S, K, H]
    segments: jax.Array  # int32 [B, S]; 0 where there is no token (yet)
    prefix: jax.Array  # int32 [B, S]
    index: jax.Array  # int32 [B], where the next token goes
    cross_keys: jax.Array | None = None  # [L, B, S', K, H], of the encoder's output
    cross_values: jax.Array | None = None
    cross_segments: jax.Array | None = None  # int32 [B, S']

    @property
    def length(self) -> int:
        """S, the tokens that a row has room for."""
        return self.keys.shape[2]

    @classmethod
    def empty(cls, layers: int, batch: int, length: int, kv_heads: int, head_dim: int, dtype):
        """A cache without tokens and without an encoder."""
        shape = (layers, batch, length, kv_heads, head_dim)
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            segments=jnp.zeros((batch, length), jnp.int32),
            prefix=jnp.zeros((batch, length), jnp.int32),
            index=jnp.zeros((batch,), jnp.int32),
        )

    def take(self, rows: jax.Array) -> Cache:
        """The cache of ``rows`` (int32 [B'], indices of rows; a row may be taken many times)."""
        per_layer = {"keys", "values", "cross_keys", "cross_values"}
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(
            self,
            **{
                name: jnp.take(x, rows, axis=1 if name in per_layer else 0)
                for name, x in arrays.items()
                if x is not None
            },
        )

    def rows(self, tokens: int) -> jax.Array:
        """Indices of the next ``tokens`` tokens of each row, int32 [B, tokens]."""
        return self.index[:, None] + jnp.arange(tokens, dtype=jnp.int32)

    def extended(self, segments_BT: jax.Array, prefix_BT: jax.Array) -> Cache:
        """Room taken for T tokens (of which trailing ones of segment 0 are padding)."""
        tokens = segments_BT.shape[1]
        at = (jnp.arange(len(segments_BT))[:, None], self.rows(tokens))
        used = jnp.where(segments_BT != 0, jnp.arange(1, tokens + 1, dtype=jnp.int32), 0).max(1)
        return dataclasses.replace(
            self,
            segments=self.segments.at[at].set(segments_BT.astype(jnp.int32), mode="drop"),
            prefix=self.prefix.at[at].set(prefix_BT.astype(jnp.int32), mode="drop"),
            index=self.index + used,
        )
