"""T5 (Raffel et al. 2020), T5 1.1, UL2 (Tay et al. 2022), ByT5 and mT5 (Xue et al. 2021)."""

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
WRITTEN = {value: name for name, value in reversed(PROJECTIONS.items())}


class T5(Family):
    """``T5ForConditionalGeneration``.

    The output projection is tied unless the files have one of its own, and the logits of a tied
    T5 1.0 are scaled. transformers 5 keeps the two apart (``scale_decoder_outputs``); before, and
    in most config.json, ``tie_word_embeddings`` said both.
    """

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
        width, depth = fields.integer("d_model", 512), fields.integer("num_layers", 6)
        activation, gated = fields.choose("feed_forward_proj", PROJECTIONS, "relu")
        one = fields.get("tie_word_embeddings", True)
        scaled = fields.get("scale_decoder_outputs", one)
        tied = one and "lm_head.weight" not in names if "scale_decoder_outputs" in fields else one
        rate = float(fields.get("dropout_rate", 0.1))
        return Transformer(
            kind="encoder_decoder",
            width=width,
            layers=fields.get("num_decoder_layers", None, (int, type(None))) or depth,
            encoder_layers=depth,
            attention=Attention(
                heads=fields.integer("num_heads", 8),
                head_dim=fields.integer("d_kv", 64),
                scale=1.0,
                dropout=rate,
            ),
            mlp=MLP(
                width=fields.integer("d_ff", 2048), activation=activation, gated=gated, dropout=rate
            ),
            norm=RMSNorm(epsilon=fields.get("layer_norm_epsilon", 1e-6)),
            positions=RelativeBias(
                buckets=fields.integer("relative_attention_num_buckets", 32),
                max_distance=fields.integer("relative_attention_max_distance", 128),
            ),
            tied=tied,
            logit_scale=width**-0.5 if scaled else 1.0,
            dropout=rate,
        )

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        positions = model.positions
        found: dict[str, Any] = {
            "d_model": model.width,
            "d_kv": model.head_dim,
            "d_ff": model.mlp.width or 4 * model.width,
            "num_heads": model.attention.heads,
            "num_layers": model.depth_of_encoder,
            "num_decoder_layers": model.depth_of_decoder,
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
            first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            yield transposed(first, f"{stack}/relative_bias/w")
            yield from norm(f"{stack}.final_layer_norm", f"{stack}/final_norm")
            yield from layers(
                depth, f"{stack}.block.{{}}.layer.", stack, lambda _, s=stack: self._layer(model, s)
            )

    def _layer(self, model: Transformer, stack: str) -> Iterator[Entry]:
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
