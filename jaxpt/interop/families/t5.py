"""T5 (Raffel et al. 2020), T5 1.1, UL2 (Tay et al. 2022), ByT5 and mT5 (Xue et al. 2021), and umT5
(Chung et al. 2023)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar

from jaxpt.interop.family import Family
from jaxpt.interop.fields import Fields
from jaxpt.interop.table import Entry, layers, linear, norm, same, transposed
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP, Activation
from jaxpt.models.norm import RMSNorm
from jaxpt.models.position import RelativeBias
from jaxpt.models.transformer import Transformer

# feed_forward_proj -> (activation, gated). "gated-gelu" is the tanh form, "gelu" the exact one.
PROJECTIONS: dict[str, tuple[Activation, bool]] = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gelu_new": ("gelu_tanh", False),
    "silu": ("silu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-gelu_new": ("gelu_tanh", True),
    "gated-relu": ("relu", True),
    "gated-silu": ("silu", True),
}
BIAS = "0.SelfAttention.relative_attention_bias.weight"
WRITTEN = {value: name for name, value in reversed(PROJECTIONS.items())}


class T5(Family):
    """``T5ForConditionalGeneration``.

    The output projection is tied unless the files have one of its own, and the logits of a tied
    T5 1.0 are scaled. transformers 5 keeps the two apart (``scale_decoder_outputs``); before, and
    in most config.json, ``tie_word_embeddings`` said both.
    """

    # What config.json may leave out and transformers then takes.
    defaults: ClassVar[dict[str, Any]] = {
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    }
    per_layer = False  # whether each layer has a relative bias of its own
    model_type = "t5"
    architecture = "T5ForConditionalGeneration"
    harmless: ClassVar[dict[str, str]] = {
        "is_decoder": "each stack sets it",
        "dense_act_fn": "follows from feed_forward_proj",
        "is_gated_act": "follows from feed_forward_proj",
        "n_positions": "nothing reads it",
    }
    left_out: ClassVar[dict[str, str]] = {
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight": (
            "cross-attention has no bias; transformers does not load it either"
        ),
    }

    def config(self, fields: Fields, names: Collection[str]) -> Transformer:
        fields.expect("is_encoder_decoder", True)
        width = fields.integer("d_model", 512)
        depth = fields.integer("num_layers", self.defaults["num_layers"])
        proj = self.defaults["feed_forward_proj"]
        activation, gated = fields.choose("feed_forward_proj", PROJECTIONS, proj)
        tied, scaled = self._head(fields, names)
        rate = float(fields.get("dropout_rate", 0.1))
        return Transformer(
            kind="encoder_decoder",
            width=width,
            layers=fields.get("num_decoder_layers", None, (int, type(None))) or depth,
            encoder_layers=depth,
            attention=Attention(
                heads=fields.integer("num_heads", self.defaults["num_heads"]),
                head_dim=fields.integer("d_kv", 64),
                scale=1.0,
                dropout=rate,
            ),
            mlp=MLP(
                width=fields.integer("d_ff", self.defaults["d_ff"]),
                activation=activation,
                gated=gated,
                dropout=rate,
            ),
            norm=RMSNorm(epsilon=fields.get("layer_norm_epsilon", 1e-6)),
            positions=RelativeBias(
                buckets=fields.integer("relative_attention_num_buckets", 32),
                max_distance=fields.integer("relative_attention_max_distance", 128),
                per_layer=self.per_layer,
            ),
            tied=tied,
            logit_scale=width**-0.5 if scaled else 1.0,
            dropout=rate,
        )

    def _head(self, fields: Fields, names: Collection[str]) -> tuple[bool, bool]:
        """(whether the output is tied, whether the logits are scaled)."""
        one = fields.get("tie_word_embeddings", True)
        if "scale_decoder_outputs" not in fields:
            return one, one
        scaled = fields.get("scale_decoder_outputs", True)
        return one and "lm_head.weight" not in names, scaled

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        positions = model.positions
        found: dict[str, Any] = {
            "d_model": model.width,
            "d_kv": model.head_dim,
            "d_ff": model.mlp.width or 4 * model.width,
            "num_heads": model.attention.heads,
            # At least one each: that a model is of one stack is then seen by its kind.
            "num_layers": model.depth_of_encoder or 1,
            "num_decoder_layers": model.depth_of_decoder or 1,
            "feed_forward_proj": WRITTEN.get((model.mlp.activation, model.mlp.gated)),
            "dropout_rate": model.dropout,
            "is_encoder_decoder": True,
            "tie_word_embeddings": model.tied,
            "scale_decoder_outputs": model.logit_scale != 1.0,
        }
        if isinstance(model.norm, RMSNorm):
            found["layer_norm_epsilon"] = model.norm.epsilon
        if isinstance(positions, RelativeBias):
            found["relative_attention_num_buckets"] = positions.buckets
            found["relative_attention_max_distance"] = positions.max_distance
        return found

    def table(self, model: Transformer) -> Iterable[Entry]:
        yield same("shared.weight", "embedding/w")
        if not model.tied:
            yield transposed("lm_head.weight", "lm_head/w")
        for stack in ("encoder", "decoder"):
            depth = model.depth_of_encoder if stack == "encoder" else model.depth_of_decoder
            if not self.per_layer:
                yield transposed(f"{stack}.block.0.layer.{BIAS}", f"{stack}/relative_bias/w")
            yield from norm(f"{stack}.final_layer_norm", f"{stack}/final_norm")
            yield from layers(
                depth, f"{stack}.block.{{}}.layer.", stack, lambda _, s=stack: self._layer(model, s)
            )

    def _layer(self, model: Transformer, stack: str) -> Iterator[Entry]:
        if self.per_layer:
            yield transposed(BIAS, "relative_bias/w")
        branches = [("SelfAttention", "attention")]
        branches += [("EncDecAttention", "cross_attention")] if stack == "decoder" else []
        for i, (theirs, ours) in enumerate(branches):
            yield from norm(f"{i}.layer_norm", f"{ours}_norm")
            for one, name in zip("qkvo", ("query", "key", "value", "out"), strict=True):
                yield from linear(f"{i}.{theirs}.{one}", f"{ours}/{name}")
        last = len(branches)
        yield from norm(f"{last}.layer_norm", "mlp_norm")
        parts = {"wi_0": "gate", "wi_1": "up"} if model.mlp.gated else {"wi": "up"}
        for theirs, ours in {**parts, "wo": "down"}.items():
            yield from linear(f"{last}.DenseReluDense.{theirs}", f"mlp/{ours}")

    def aliases(self, model: Transformer) -> dict[str, str]:
        names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
        return dict.fromkeys([*names, *(["lm_head.weight"] if model.tied else [])], "shared.weight")


class MT5(T5):
    """``MT5ForConditionalGeneration``: as T5 1.1, with logits that are never scaled."""

    defaults: ClassVar[dict[str, Any]] = {
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    }
    model_type = "mt5"
    architecture = "MT5ForConditionalGeneration"

    def _head(self, fields: Fields, names: Collection[str]) -> tuple[bool, bool]:
        # Whatever the config says: transformers ties a head that the files have not.
        fields.get("tie_word_embeddings", True)
        fields.expect("scale_decoder_outputs", False)
        return "lm_head.weight" not in names, False

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        found = super().hf_config(model)
        del found["scale_decoder_outputs"]
        return found


class UMT5(MT5):
    """``UMT5ForConditionalGeneration``: mT5 with a relative bias in every layer.

    transformers 5 takes ``tie_word_embeddings`` for true whatever the file says, and scales the
    logits of what it takes for tied. The published models say false, and were trained without: they
    are read that way, and cannot be written, as no config makes transformers 5 leave the scale out.
    """

    model_type = "umt5"
    architecture = "UMT5ForConditionalGeneration"
    per_layer = True

    def _head(self, fields: Fields, names: Collection[str]) -> tuple[bool, bool]:
        scaled = fields.get("tie_word_embeddings", True)
        return "lm_head.weight" not in names, scaled

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        return super().hf_config(model) | {"tie_word_embeddings": True}
