"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019), with their heads of masked words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar

from jaxpt.interop.activations import ACTIVATIONS, NAMES
from jaxpt.interop.family import Family
from jaxpt.interop.fields import Fields
from jaxpt.interop.table import Entry, layers, linear, norm, same
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.models.norm import LayerNorm
from jaxpt.models.position import Learned
from jaxpt.models.transformer import Transformer


class Bert(Family):
    """``BertForMaskedLM``; of ``BertForPreTraining`` the part that this is."""

    model_type = "bert"
    architecture = "BertForMaskedLM"
    also = ("BertForPreTraining",)
    prefix = "bert."
    head: ClassVar[dict[str, str]] = {
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
        "decoder": "cls.predictions.decoder",
    }
    renamed: ClassVar[dict[str, str]] = {
        r"LayerNorm\.gamma$": "LayerNorm.weight",
        r"LayerNorm\.beta$": "LayerNorm.bias",
    }
    harmless: ClassVar[dict[str, str]] = {
        "gradient_checkpointing": "how it is trained",
        "pooler_type": "of the pooler, which is left out",
        **dict.fromkeys(("pooler_fc_size", "pooler_num_fc_layers"), "of a pooler that is left out"),
        **dict.fromkeys(("pooler_num_attention_heads", "pooler_size_per_head"), "of the pooler"),
        "directionality": "nothing reads it",
    }
    left_out: ClassVar[dict[str, str]] = {
        r"bert\.embeddings\.position_ids": "a count",
        r"bert\.pooler\.dense\.(weight|bias)": "serves sentence pairs, not masked words",
        r"cls\.seq_relationship\.(weight|bias)": "serves sentence pairs, not masked words",
    }
    epsilon = 1e-12  # transformers' default

    def config(self, fields: Fields, names: Collection[str]) -> Transformer:
        fields.expect("position_embedding_type", "absolute")
        for name in ("is_decoder", "add_cross_attention"):
            fields.expect(name, False)
        fields.expect("tie_word_embeddings", True)
        return Transformer(
            kind="encoder",
            width=fields.integer("hidden_size", 768),
            layers=fields.integer("num_hidden_layers", 12),
            attention=Attention(
                heads=fields.integer("num_attention_heads", 12),
                bias=True,
                dropout=float(fields.get("attention_probs_dropout_prob", 0.1)),
            ),
            mlp=MLP(
                width=fields.integer("intermediate_size", 3072),
                activation=self._activation(fields),
                bias=True,
            ),
            norm=LayerNorm(epsilon=fields.get("layer_norm_eps", self.epsilon)),
            positions=self._positions(fields),
            placement="post",
            embedding_norm=True,
            tied=True,
            output_bias=True,
            head_transform=True,
            token_types=fields.integer("type_vocab_size", 2, least=0),
            dropout=float(fields.get("hidden_dropout_prob", 0.1)),
        )

    def _activation(self, fields: Fields):
        return fields.choose("hidden_act", ACTIVATIONS, "gelu")

    def _positions(self, fields: Fields) -> Learned:
        return Learned(fields.integer("max_position_embeddings", 512))

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        found: dict[str, Any] = {
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.attention.heads,
            "intermediate_size": model.mlp.width or 4 * model.width,
            "hidden_act": NAMES[model.mlp.activation],
            "hidden_dropout_prob": model.dropout,
            "attention_probs_dropout_prob": model.attention.dropout,
            "type_vocab_size": model.token_types,
            "tie_word_embeddings": model.tied,
        }
        if isinstance(model.norm, LayerNorm):
            found["layer_norm_eps"] = model.norm.epsilon
        if isinstance(model.positions, Learned):
            found["max_position_embeddings"] = model.positions.max_length + model.positions.offset
        return found

    def table(self, model: Transformer) -> Iterable[Entry]:
        at = f"{self.prefix}embeddings"
        yield same(f"{at}.word_embeddings.weight", "embedding/w")
        yield same(f"{at}.position_embeddings.weight", "encoder/positions/w")
        yield same(f"{at}.token_type_embeddings.weight", "token_types/w")
        yield from norm(f"{at}.LayerNorm", "encoder/embedding_norm", bias=True)
        at = f"{self.prefix}encoder.layer.{{}}."
        yield from layers(model.layers, at, "encoder", lambda _: self._layer())
        yield from linear(self.head["dense"], "transform", bias=True)
        yield from norm(self.head["norm"], "transform_norm", bias=True)
        yield same(self.head["bias"], "lm_head_bias")

    def _layer(self) -> Iterator[Entry]:
        for name in ("query", "key", "value"):
            yield from linear(f"attention.self.{name}", f"attention/{name}", bias=True)
        yield from linear("attention.output.dense", "attention/out", bias=True)
        yield from norm("attention.output.LayerNorm", "attention_norm", bias=True)
        yield from linear("intermediate.dense", "mlp/up", bias=True)
        yield from linear("output.dense", "mlp/down", bias=True)
        yield from norm("output.LayerNorm", "mlp_norm", bias=True)

    def aliases(self, model: Transformer) -> dict[str, str]:
        decoder = self.head["decoder"]
        return {
            f"{decoder}.weight": f"{self.prefix}embeddings.word_embeddings.weight",
            f"{decoder}.bias": self.head["bias"],
        }


class Roberta(Bert):
    """``RobertaForMaskedLM``. Positions begin after the id of padding, so that their table has so
    many rows more; the head's activation is always the exact GELU."""

    model_type = "roberta"
    architecture = "RobertaForMaskedLM"
    also = ()
    prefix = "roberta."
    head: ClassVar[dict[str, str]] = {
        "dense": "lm_head.dense",
        "norm": "lm_head.layer_norm",
        "bias": "lm_head.bias",
        "decoder": "lm_head.decoder",
    }
    renamed: ClassVar[dict[str, str]] = {}
    left_out: ClassVar[dict[str, str]] = {
        r"roberta\.embeddings\.position_ids": "a count",
        r"roberta\.pooler\.dense\.(weight|bias)": "serves classifiers, not masked words",
    }

    def _activation(self, fields: Fields):
        fields.expect("hidden_act", "gelu")
        return "gelu"

    def _positions(self, fields: Fields) -> Learned:
        offset = fields.integer("pad_token_id", 1, least=0) + 1
        rows = fields.integer("max_position_embeddings", 512)
        return Learned(rows - offset, offset=offset)

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        offset = model.positions.offset if isinstance(model.positions, Learned) else 2
        return super().hf_config(model) | {"pad_token_id": offset - 1}
