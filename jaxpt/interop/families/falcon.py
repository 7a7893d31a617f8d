"""Falcon (Almazrouei et al. 2023)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np

from jaxpt.errors import ConfigError
from jaxpt.interop.activations import ACTIVATIONS, NAMES
from jaxpt.interop.family import Family
from jaxpt.interop.fields import Fields
from jaxpt.interop.rope import rotary, rotary_fields
from jaxpt.interop.table import Arrays, Entry, Shapes, layers, linear, norm, same, transposed
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.models.norm import LayerNorm
from jaxpt.models.position import Rotary
from jaxpt.models.transformer import Transformer

NONE = type(None)


class Falcon(Family):
    """``FalconForCausalLM`` with rotary positions. A parallel block has one norm (7B, 11B) or one
    for each branch (40B, 180B).

    ALiBi (the RW models) is refused: transformers rounds its biases to bfloat16, so that no other
    code gives the same logits.
    """

    model_type = "falcon"
    architecture = "FalconForCausalLM"
    harmless: ClassVar[dict[str, str]] = {
        "attention_dropout": "how training regularises",
        "ff_factor": "ffn_hidden_size is read",
    }
    left_out: ClassVar[dict[str, str]] = {r".*rotary_emb\.inv_freq": "follow from the config"}

    def config(self, fields: Fields, names: Collection[str]) -> Transformer:
        fields.expect("alibi", False)
        fields.expect("apply_residual_connection_post_layernorm", False)
        width = fields.integer("hidden_size", 4544)
        heads = fields.integer("num_attention_heads", 71)
        new = fields.get("new_decoder_architecture", False)
        parallel = fields.get("parallel_attn", True)
        kv_heads = fields.get("num_kv_heads", None, (int, NONE)) or heads
        one = fields.get("multi_query", True)  # which the new architecture does not look at
        if not new:
            kv_heads = 1 if one else kv_heads
            if kv_heads not in (1, heads):
                raise ConfigError("num_kv_heads", f"{kv_heads} is not the heads' {heads}")
        bias = fields.get("bias", False)
        max_length = fields.integer("max_position_embeddings", 2048)
        return Transformer(
            kind="decoder",
            width=width,
            layers=fields.integer("num_hidden_layers", 32),
            attention=Attention(heads=heads, kv_heads=kv_heads, bias=bias),
            mlp=MLP(
                width=fields.get("ffn_hidden_size", None, (int, NONE)) or 4 * width,
                activation=fields.choose("activation", ACTIVATIONS, "gelu"),
                bias=bias,
            ),
            norm=LayerNorm(epsilon=fields.get("layer_norm_epsilon", 1e-5)),
            positions=rotary(fields, max_length=max_length),
            parallel=parallel,
            parallel_norms=self._norms(fields, new, parallel) == 2,
            tied=fields.get("tie_word_embeddings", True),
            dropout=float(fields.get("hidden_dropout", 0.0)),
        )

    def _norms(self, fields: Fields, new: bool, parallel: bool) -> int:
        """Norms of a parallel block."""
        count = fields.get("num_ln_in_parallel_attn", None, (int, NONE)) or (2 if new else 1)
        if count not in ((1, 2) if new else (1,)):
            raise ConfigError(
                "num_ln_in_parallel_attn",
                f"{count} is not supported; 1 is, and 2 with new_decoder_architecture",
            )
        if new and not parallel:
            raise ConfigError("parallel_attn", "false is not supported in the new architecture")
        return count

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        attention, positions, kv_heads = model.attention, model.positions, model.attention.groups()
        old = not model.parallel_norms and kv_heads in (1, attention.heads)
        found: dict[str, Any] = {
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": attention.heads,
            "num_kv_heads": kv_heads,
            "multi_query": kv_heads == 1,
            "new_decoder_architecture": not old,
            "parallel_attn": model.parallel,
            "ffn_hidden_size": model.mlp.width or 4 * model.width,
            "activation": NAMES[model.mlp.activation],
            "bias": model.mlp.bias,
            "alibi": False,
            "hidden_dropout": model.dropout,
            "tie_word_embeddings": model.tied,
        }
        if not old:
            found["num_ln_in_parallel_attn"] = 2 if model.parallel_norms else 1
        if isinstance(model.norm, LayerNorm):
            found["layer_norm_epsilon"] = model.norm.epsilon
        if isinstance(positions, Rotary):
            found |= rotary_fields(positions)
        return found

    def table(self, model: Transformer) -> Iterable[Entry]:
        yield same("transformer.word_embeddings.weight", "embedding/w")
        if not model.tied:
            yield transposed("lm_head.weight", "lm_head/w")
        yield from norm("transformer.ln_f", "decoder/final_norm", bias=True)
        yield from layers(
            model.layers, "transformer.h.{}.", "decoder", lambda _: self._layer(model)
        )

    def _layer(self, model: Transformer) -> Iterator[Entry]:
        if model.parallel_norms:
            norms = {"ln_attn": "attention_norm", "ln_mlp": "mlp_norm"}
        elif model.parallel:
            norms = {"input_layernorm": "branches_norm"}
        else:
            norms = {
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "mlp_norm",
            }
        for theirs, ours in norms.items():
            yield from norm(theirs, ours, bias=True)
        bias, groups, head_dim = model.mlp.bias, model.attention.groups(), model.head_dim
        yield _grouped("self_attention.query_key_value.weight", "/w", groups, head_dim)
        if bias:
            yield _grouped("self_attention.query_key_value.bias", "_bias", groups, head_dim)
        yield from linear("self_attention.dense", "attention/out", bias=bias)
        yield from linear("mlp.dense_h_to_4h", "mlp/up", bias=bias)
        yield from linear("mlp.dense_4h_to_h", "mlp/down", bias=bias)

    def aliases(self, model: Transformer) -> dict[str, str]:
        return {"lm_head.weight": "transformer.word_embeddings.weight"} if model.tied else {}


def _grouped(theirs: str, ours: str, groups: int, head_dim: int) -> Entry:
    """Queries of a group's heads, then its key and its value; group after group. Where there are
    several groups, numpy has to copy to take them apart."""

    def load(arrays: Arrays, shapes: Shapes) -> Arrays:
        whole = arrays[0].T
        if whole.shape[-1] % (groups * head_dim):
            return [whole] * 3  # of wrong shapes, which the caller will say
        heads = whole.reshape(*whole.shape[:-1], groups, -1, head_dim)
        parts = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
        return [part.reshape(*whole.shape[:-1], -1) for part in parts]

    def save(arrays: Arrays) -> Arrays:
        split = [a.reshape(*a.shape[:-1], groups, -1, head_dim) for a in arrays]
        whole = np.concatenate(split, axis=-2)
        return [whole.reshape(*whole.shape[:-3], -1).T]

    names = tuple(f"attention/{name}{ours}" for name in ("query", "key", "value"))
    return Entry((theirs,), names, load, save)
