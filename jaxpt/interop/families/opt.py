"""OPT (Zhang et al. 2022)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar

from jaxpt.interop.activations import ACTIVATIONS, NAMES
from jaxpt.interop.family import Family
from jaxpt.interop.fields import Fields
from jaxpt.interop.table import Entry, layers, linear, norm, same, transposed
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.models.norm import LayerNorm
from jaxpt.models.position import Learned
from jaxpt.models.transformer import Transformer

NONE = type(None)
OFFSET = 2  # rows of the table of positions before that of position 0


class OPT(Family):
    """``OPTForCausalLM``. The 350M alone has norms after the sums, and embeddings of another width,
    which are projected in and out."""

    model_type = "opt"
    architecture = "OPTForCausalLM"
    prefix = "model."
    harmless: ClassVar[dict[str, str]] = {
        "init_std": "how training initialises",
        "activation_dropout": "transformers does not apply it",
    }

    def config(self, fields: Fields, names: Collection[str]) -> Transformer:
        fields.expect("layerdrop", 0.0)
        fields.expect("layer_norm_elementwise_affine", True)
        width = fields.integer("hidden_size", 768)
        pre, bias = fields.get("do_layer_norm_before", True), fields.get("enable_bias", True)
        without = fields.get("_remove_final_layer_norm", False)
        return Transformer(
            kind="decoder",
            width=width,
            layers=fields.integer("num_hidden_layers", 12),
            embedding_width=fields.get("word_embed_proj_dim", None, (int, NONE)) or width,
            embedding_projection="in_and_out",
            attention=Attention(
                heads=fields.integer("num_attention_heads", 12),
                bias=bias,
                dropout=float(fields.get("attention_dropout", 0.0)),
            ),
            mlp=MLP(
                width=fields.integer("ffn_dim", 3072),
                activation=fields.choose("activation_function", ACTIVATIONS, "relu"),
                bias=bias,
            ),
            norm=LayerNorm(epsilon=1e-5),
            positions=Learned(fields.integer("max_position_embeddings", 2048), offset=OFFSET),
            placement="pre" if pre else "post",
            final_norm=pre and not without,
            tied=fields.get("tie_word_embeddings", True),
            dropout=float(fields.get("dropout", 0.1)),
        )

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        positions, pre = model.positions, model.placement == "pre"
        found: dict[str, Any] = {
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "word_embed_proj_dim": model.width_of_embedding,
            "num_attention_heads": model.attention.heads,
            "ffn_dim": model.mlp.width or 4 * model.width,
            "activation_function": NAMES[model.mlp.activation],
            "enable_bias": model.mlp.bias,
            "do_layer_norm_before": pre,
            "_remove_final_layer_norm": pre and not model.has_final_norm,
            "attention_dropout": model.attention.dropout,
            "dropout": model.dropout,
            "tie_word_embeddings": model.tied,
        }
        if isinstance(positions, Learned):
            found["max_position_embeddings"] = positions.max_length
        return found

    def table(self, model: Transformer) -> Iterable[Entry]:
        yield same("model.decoder.embed_tokens.weight", "embedding/w")
        yield same("model.decoder.embed_positions.weight", "decoder/positions/w")
        if model.projects_out:
            yield from linear("model.decoder.project_in", "decoder/embedding_projection")
            yield from linear("model.decoder.project_out", "output_projection")
        if not model.tied:
            yield transposed("lm_head.weight", "lm_head/w")
        if model.has_final_norm:
            yield from norm("model.decoder.final_layer_norm", "decoder/final_norm", bias=True)
        yield from layers(
            model.layers, "model.decoder.layers.{}.", "decoder", lambda _: self._layer(model)
        )

    def _layer(self, model: Transformer) -> Iterator[Entry]:
        yield from norm("self_attn_layer_norm", "attention_norm", bias=True)
        yield from norm("final_layer_norm", "mlp_norm", bias=True)
        for theirs, ours in {"q_proj": "query", "k_proj": "key", "v_proj": "value"}.items():
            yield from linear(f"self_attn.{theirs}", f"attention/{ours}", bias=model.attention.bias)
        yield from linear("self_attn.out_proj", "attention/out", bias=model.attention.bias)
        yield from linear("fc1", "mlp/up", bias=model.mlp.bias)
        yield from linear("fc2", "mlp/down", bias=model.mlp.bias)

    def aliases(self, model: Transformer) -> dict[str, str]:
        return {"lm_head.weight": "model.decoder.embed_tokens.weight"} if model.tied else {}
