"""LLaMA (Touvron et al. 2023) and Mistral (Jiang et al. 2023); what their kin share with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar

from jaxpt.errors import ConfigError
from jaxpt.interop.activations import ACTIVATIONS, NAMES
from jaxpt.interop.family import Family
from jaxpt.interop.fields import Fields
from jaxpt.interop.rope import rotary, rotary_fields
from jaxpt.interop.table import Entry, layers, linear, norm, same, transposed
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.models.norm import RMSNorm
from jaxpt.models.position import Rotary
from jaxpt.models.transformer import Placement, Transformer

NONE = type(None)
Windows = tuple[int | None, ...]


class LlamaLike(Family):
    """Decoders with RMSNorm, rotary positions and a gated MLP; subclasses say what is different.

    defaults: transformers' own, where config.json lacks a field.
    norms: our norm of a layer -> theirs.
    mlp_bias: whether config.json says if the MLP has biases.
    """

    harmless: ClassVar[dict[str, str]] = {"max_sequence_length": "as max_position_embeddings"}
    left_out: ClassVar[dict[str, str]] = {r".*rotary_emb\.inv_freq": "follow from the config"}
    defaults: ClassVar[dict[str, Any]] = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    }
    norms: ClassVar[dict[str, str]] = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    placement: ClassVar[Placement] = "pre"
    qk_norm: ClassVar[bool] = False
    qk_norm_whole: ClassVar[bool] = False
    mlp_bias: ClassVar[bool] = False

    def config(self, fields: Fields, names: Collection[str]) -> Transformer:
        fields.expect("is_encoder_decoder", False)
        width = self._integer(fields, "hidden_size")
        heads = self._integer(fields, "num_attention_heads")
        head_dim = self._integer(fields, "head_dim", optional=True)
        depth = self._integer(fields, "num_hidden_layers")
        windows, (bias, out_bias) = self._windows(fields, depth), self._biases(fields)
        positions = self._positions(fields, self._integer(fields, "max_position_embeddings"))
        return Transformer(
            kind="decoder",
            width=width,
            layers=depth,
            attention=Attention(
                heads=heads,
                kv_heads=self._integer(fields, "num_key_value_heads", optional=True),
                head_dim=None if head_dim and head_dim * heads == width else head_dim,
                bias=bias,
                out_bias=out_bias,
                qk_norm=self.qk_norm,
                qk_norm_whole=self.qk_norm_whole,
                window=windows if any(windows) else (),
                dropout=float(fields.get("attention_dropout", None, (float, NONE)) or 0),
            ),
            mlp=MLP(
                width=self._integer(fields, "intermediate_size"),
                activation=fields.choose("hidden_act", ACTIVATIONS, "silu"),
                gated=True,
                bias=fields.get("mlp_bias", False) if self.mlp_bias else False,
            ),
            norm=RMSNorm(epsilon=fields.get("rms_norm_eps", self.defaults["rms_norm_eps"])),
            positions=positions,
            placement=self.placement,
            tied=fields.get("tie_word_embeddings", False),
        )

    def _integer(self, fields: Fields, name: str, *, optional: bool = False) -> Any:
        return fields.get(name, self.defaults[name], (int, NONE) if optional else int)

    def _positions(self, fields: Fields, max_length: int) -> Rotary:
        return rotary(fields, max_length=max_length)

    def _windows(self, fields: Fields, depth: int) -> Windows:
        """The reach of each layer, or of all."""
        return ()

    def _biases(self, fields: Fields) -> tuple[bool, bool | None]:
        """``bias`` and ``out_bias`` of ``Attention``."""
        return fields.get("attention_bias", False), None

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        attention, positions = model.attention, model.positions
        found: dict[str, Any] = {
            "hidden_size": model.width,
            "intermediate_size": model.mlp.width or 4 * model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.groups(),
            "hidden_act": NAMES[model.mlp.activation],
            "attention_dropout": attention.dropout,
            "tie_word_embeddings": model.tied,
        }
        if self.defaults["head_dim"] or model.width != attention.heads * model.head_dim:
            found["head_dim"] = model.head_dim
        if isinstance(model.norm, RMSNorm):
            found["rms_norm_eps"] = model.norm.epsilon
        if isinstance(positions, Rotary):
            found |= rotary_fields(positions)
        windows = tuple(attention.window_of_layer(i) for i in range(model.layers))
        return found | self._more(model, windows)

    def _more(self, model: Transformer, windows: Windows) -> dict[str, Any]:
        """Fields of this family alone."""
        return {"attention_bias": model.attention.bias}

    def table(self, model: Transformer) -> Iterable[Entry]:
        yield same("model.embed_tokens.weight", "embedding/w")
        if not model.tied:
            yield transposed("lm_head.weight", "lm_head/w")
        yield from norm("model.norm", "decoder/final_norm")
        yield from layers(model.layers, "model.layers.{}.", "decoder", lambda _: self._layer(model))

    def _layer(self, model: Transformer) -> Iterator[Entry]:
        for ours, theirs in self.norms.items():
            yield from norm(theirs, ours)
        if model.attention.qk_norm:
            yield from norm("self_attn.q_norm", "attention/query_norm")
            yield from norm("self_attn.k_norm", "attention/key_norm")
        yield from self._matrices(model)

    def _matrices(self, model: Transformer) -> Iterator[Entry]:
        attention = model.attention
        for theirs, ours in {"q": "query", "k": "key", "v": "value"}.items():
            yield from linear(f"self_attn.{theirs}_proj", f"attention/{ours}", bias=attention.bias)
        bias = attention.bias if attention.out_bias is None else attention.out_bias
        yield from linear("self_attn.o_proj", "attention/out", bias=bias)
        for name in ("gate", "up", "down"):
            yield from linear(f"mlp.{name}_proj", f"mlp/{name}", bias=model.mlp.bias)

    def aliases(self, model: Transformer) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if model.tied else {}


class Llama(LlamaLike):
    """``LlamaForCausalLM``: LLaMA 1 to 3."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    mlp_bias = True

    def config(self, fields, names):
        found = super().config(fields, names)
        if found.width % found.attention.heads:
            raise ConfigError(
                "num_attention_heads",
                f"{found.attention.heads} does not divide hidden_size = {found.width}, which "
                "transformers asks of this family even where there is a head_dim",
            )
        return found

    def _more(self, model, windows):
        return {"attention_bias": model.attention.bias, "mlp_bias": model.mlp.bias}


class Mistral(LlamaLike):
    """``MistralForCausalLM`` (Jiang et al. 2023): one window for all layers, or none."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **LlamaLike.defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }

    def _windows(self, fields, depth):
        return (self._integer(fields, "sliding_window", optional=True),)

    def _biases(self, fields):
        return False, None

    def _more(self, model, windows):
        return {"sliding_window": windows[0]}
