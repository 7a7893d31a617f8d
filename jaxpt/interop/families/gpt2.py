"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar

from jaxpt.interop.activations import ACTIVATIONS, NAMES
from jaxpt.interop.family import Family
from jaxpt.interop.fields import Fields
from jaxpt.interop.table import Entry, joined, layers, norm, same, transposed
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.models.norm import LayerNorm
from jaxpt.models.position import Learned
from jaxpt.models.transformer import Transformer

SUMMARY = "of a classifier's head"


class GPT2(Family):
    """``GPT2LMHeadModel``. Its matrices are [in, out], as ours."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    harmless: ClassVar[dict[str, str]] = {
        "n_ctx": "as n_positions",
        "_num_labels": SUMMARY,
        **dict.fromkeys(("n_special", "predict_special_tokens"), "of GPT's first code"),
        "reorder_and_upcast_attn": "how half precision is rounded",
        **dict.fromkeys(("summary_type", "summary_use_proj", "summary_activation"), SUMMARY),
        **dict.fromkeys(("summary_proj_to_labels", "summary_first_dropout"), SUMMARY),
    }
    left_out: ClassVar[dict[str, str]] = {r".*\.attn\.(masked_)?bias": "a causal mask"}

    def config(self, fields: Fields, names: Collection[str]) -> Transformer:
        for name in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
            fields.expect(name, False)
        width = fields.integer("n_embd", 768)
        rate = fields.get("resid_pdrop", 0.1)
        fields.expect("embd_pdrop", rate, 0.1)
        return Transformer(
            kind="decoder",
            width=width,
            layers=fields.integer("n_layer", 12),
            attention=Attention(
                heads=fields.integer("n_head", 12),
                bias=True,
                scale=None if fields.get("scale_attn_weights", True) else 1.0,
                dropout=float(fields.get("attn_pdrop", 0.1)),
            ),
            mlp=MLP(
                width=fields.get("n_inner", None, (int, type(None))) or 4 * width,
                activation=fields.choose("activation_function", ACTIVATIONS, "gelu_new"),
                bias=True,
            ),
            norm=LayerNorm(epsilon=fields.get("layer_norm_epsilon", 1e-5)),
            positions=Learned(fields.integer("n_positions", 1024)),
            tied=fields.get("tie_word_embeddings", True),
            dropout=float(rate),
        )

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        attention, positions = model.attention, model.positions
        found: dict[str, Any] = {
            "n_embd": model.width,
            "n_layer": model.layers,
            "n_head": attention.heads,
            "n_inner": model.mlp.width,
            "activation_function": NAMES[model.mlp.activation],
            "scale_attn_weights": attention.scale != 1.0,
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout,
            "attn_pdrop": attention.dropout,
            "tie_word_embeddings": model.tied,
        }
        if isinstance(model.norm, LayerNorm):
            found["layer_norm_epsilon"] = model.norm.epsilon
        if isinstance(positions, Learned):
            found["n_positions"] = positions.max_length
        return found

    def table(self, model: Transformer) -> Iterable[Entry]:
        yield same("transformer.wte.weight", "embedding/w")
        yield same("transformer.wpe.weight", "decoder/positions/w")
        if not model.tied:
            yield transposed("lm_head.weight", "lm_head/w")
        yield from norm("transformer.ln_f", "decoder/final_norm", bias=True)
        yield from layers(model.layers, "transformer.h.{}.", "decoder", lambda _: self._layer())

    def _layer(self) -> Iterator[Entry]:
        yield from norm("ln_1", "attention_norm", bias=True)
        yield from norm("ln_2", "mlp_norm", bias=True)
        for theirs, ours in (("weight", "/w"), ("bias", "_bias")):
            parts = [f"attention/{name}{ours}" for name in ("query", "key", "value")]
            yield joined(f"attn.c_attn.{theirs}", parts, turned=False)
            yield same(f"attn.c_proj.{theirs}", f"attention/out{ours}")
            yield same(f"mlp.c_fc.{theirs}", f"mlp/up{ours}")
            yield same(f"mlp.c_proj.{theirs}", f"mlp/down{ours}")

    def aliases(self, model: Transformer) -> dict[str, str]:
        return {"lm_head.weight": "transformer.wte.weight"} if model.tied else {}
