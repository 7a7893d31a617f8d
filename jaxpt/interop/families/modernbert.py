"""ModernBERT (Warner et al. 2024), with its head of masked words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar

from jaxpt.errors import ConfigError
from jaxpt.interop.activations import ACTIVATIONS, NAMES
from jaxpt.interop.family import Family
from jaxpt.interop.fields import Fields
from jaxpt.interop.table import Entry, joined, layers, linear, norm, same
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.models.norm import LayerNorm
from jaxpt.models.position import Rotary
from jaxpt.models.transformer import Transformer

GLOBAL, LOCAL = "full_attention", "sliding_attention"


class ModernBert(Family):
    """``ModernBertForMaskedLM``.

    Layers of local attention have a window and a rotary base of their own. The first layer has no
    norm before its attention (the embedding's norm is there), so layers are not stacked.
    """

    model_type = "modernbert"
    architecture = "ModernBertForMaskedLM"
    prefix = "model."
    harmless: ClassVar[dict[str, str]] = {
        "max_position_embeddings": "rotary positions have no table",
        "initializer_cutoff_factor": "how it is initialised",
        "classifier_pooling": "of a classifier's head",
        "position_embedding_type": "nothing reads it",
        "layer_norm_eps": "norm_eps is read",
        **dict.fromkeys(("deterministic_flash_attn", "reference_compile"), "how it is computed"),
        **dict.fromkeys(("repad_logits_with_grad", "unpad_inputs"), "how it is computed"),
        **dict.fromkeys(("sparse_prediction", "sparse_pred_ignore_index"), "which logits are made"),
        **dict.fromkeys(("cls_token_id", "sep_token_id"), "how text is read"),
    }

    def config(self, fields: Fields, names: Collection[str]) -> Transformer:
        depth = fields.integer("num_hidden_layers", 22)
        fields.expect("tie_word_embeddings", True)
        windows = self._windows(fields, depth)
        base, local = self._bases(fields)
        activation = fields.choose("hidden_activation", ACTIVATIONS, "gelu")
        if fields.choose("classifier_activation", ACTIVATIONS, "gelu") != activation:
            raise ConfigError("classifier_activation", "it must be the same as hidden_activation")
        rate = float(fields.get("embedding_dropout", 0.0))
        bias = fields.get("norm_bias", False)
        return Transformer(
            kind="encoder",
            width=fields.integer("hidden_size", 768),
            layers=depth,
            attention=Attention(
                heads=fields.integer("num_attention_heads", 12),
                bias=fields.get("attention_bias", False),
                window=windows if any(windows) else (),
                dropout=float(fields.get("attention_dropout", 0.0)),
            ),
            mlp=MLP(
                width=fields.integer("intermediate_size", 1152),
                activation=activation,
                gated=True,
                bias=fields.get("mlp_bias", False),
                dropout=float(fields.get("mlp_dropout", 0.0)),
            ),
            norm=LayerNorm(epsilon=fields.get("norm_eps", 1e-5), bias=bias),
            positions=Rotary(base, local_base=local),
            first_norm=False,
            embedding_norm=True,
            tied=True,
            output_bias=fields.get("decoder_bias", True),
            head_transform=True,
            head_transform_bias=fields.get("classifier_bias", False),
            dropout=rate,
            scan=False,
        )

    def _windows(self, fields: Fields, depth: int) -> tuple[int | None, ...]:
        """The reach of each layer: half of ``local_attention`` on each side, and oneself."""
        every = fields.integer("global_attn_every_n_layers", 3)
        kinds = fields.get("layer_types", None, (list, type(None)))
        if kinds is None:
            kinds = [LOCAL if i % every else GLOBAL for i in range(depth)]
        if len(kinds) != depth or not {*kinds} <= {GLOBAL, LOCAL}:
            raise ConfigError("layer_types", f"{kinds} does not say {GLOBAL} or {LOCAL} of each")
        reach = fields.integer("local_attention", 128, least=0) // 2 + 1
        return tuple(reach if kind == LOCAL else None for kind in kinds)

    def _bases(self, fields: Fields) -> tuple[float, float]:
        """The rotary bases of layers with full and with local attention."""
        given = fields.get("rope_parameters", None, (dict, type(None))) or {}
        fields.expect("rope_scaling", None)
        found = []
        for kind, name, default in (
            (GLOBAL, "global_rope_theta", 160_000.0),
            (LOCAL, "local_rope_theta", 10_000.0),
        ):
            theta = fields.get(name, default, (float, type(None))) or default
            rope = dict(given.get(kind) or {})
            if (variant := rope.pop("rope_type", "default")) != "default":
                raise ConfigError("rope_parameters", f"{variant!r} of {kind} is not supported")
            found.append(float(rope.pop("rope_theta", theta)))
            if rope:
                raise ConfigError("rope_parameters", f"{', '.join(rope)} is not understood")
        return found[0], found[1]

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        attention, windows = model.attention, set(model.attention.window) - {None}
        reach = windows.pop() if windows else None
        found: dict[str, Any] = {
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": attention.heads,
            "intermediate_size": model.mlp.width or 4 * model.width,
            "hidden_activation": NAMES[model.mlp.activation],
            "classifier_activation": NAMES[model.mlp.activation],
            "attention_bias": attention.bias,
            "attention_dropout": attention.dropout,
            "mlp_bias": model.mlp.bias,
            "mlp_dropout": model.mlp.dropout,
            "embedding_dropout": model.dropout,
            "decoder_bias": model.output_bias,
            "classifier_bias": model.head_transform_bias,
            "tie_word_embeddings": model.tied,
            "layer_types": [
                LOCAL if attention.window_of_layer(i) else GLOBAL for i in range(model.layers)
            ],
        }
        if reach is not None:
            found["local_attention"] = 2 * (reach - 1)
        if isinstance(model.norm, LayerNorm):
            found |= {"norm_eps": model.norm.epsilon, "norm_bias": model.norm.bias}
        if isinstance(model.positions, Rotary):
            bases = model.positions.base, model.positions.local_base or model.positions.base
            found["rope_parameters"] = {
                kind: {"rope_type": "default", "rope_theta": base}
                for kind, base in zip((GLOBAL, LOCAL), bases, strict=True)
            }
        return found

    def table(self, model: Transformer) -> Iterable[Entry]:
        bias = isinstance(model.norm, LayerNorm) and model.norm.bias
        yield same("model.embeddings.tok_embeddings.weight", "embedding/w")
        yield from norm("model.embeddings.norm", "encoder/embedding_norm", bias=bias)
        yield from norm("model.final_norm", "encoder/final_norm", bias=bias)
        yield from layers(
            model.layers, "model.layers.{}.", "encoder", lambda i: self._layer(model, i, bias)
        )
        yield from linear("head.dense", "transform", bias=model.head_transform_bias)
        yield from norm("head.norm", "transform_norm", bias=bias)
        if model.output_bias:
            yield same("decoder.bias", "lm_head_bias")

    def _layer(self, model: Transformer, layer: int, bias: bool) -> Iterator[Entry]:
        if layer > 0:
            yield from norm("attn_norm", "attention_norm", bias=bias)
        parts = [f"attention/{name}" for name in ("query", "key", "value")]
        yield joined("attn.Wqkv.weight", [f"{part}/w" for part in parts])
        if model.attention.bias:
            yield joined("attn.Wqkv.bias", [f"{part}_bias" for part in parts])
        yield from linear("attn.Wo", "attention/out", bias=model.attention.bias)
        yield from norm("mlp_norm", "mlp_norm", bias=bias)
        yield joined("mlp.Wi.weight", ["mlp/gate/w", "mlp/up/w"])
        if model.mlp.bias:
            yield joined("mlp.Wi.bias", ["mlp/gate_bias", "mlp/up_bias"])
        yield from linear("mlp.Wo", "mlp/down", bias=model.mlp.bias)

    def aliases(self, model: Transformer) -> dict[str, str]:
        return {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
