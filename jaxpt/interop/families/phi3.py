"""Phi 3 and Phi 4 (Abdin et al. 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from jaxpt.interop.families.llama import LlamaLike
from jaxpt.interop.rope import rotary
from jaxpt.interop.table import Entry, joined, linear
from jaxpt.models.transformer import Transformer

# Names of LongRoPE in the first versions.
KINDS = {"su": "longrope", "yarn": "longrope"}


class Phi3(LlamaLike):
    """``Phi3ForCausalLM``: LLaMA with fused matrices, LongRoPE, rotation of some of the channels,
    and a window."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    harmless: ClassVar[dict[str, str]] = dict.fromkeys(
        ("embd_pdrop", "full_attn_mod", "interpolate_factor"), "transformers does not look at it"
    )
    defaults: ClassVar[dict[str, Any]] = {
        **LlamaLike.defaults,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }

    def config(self, fields, names):
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            fields.expect(name, False)
        found = super().config(fields, names)
        return dataclasses.replace(found, dropout=float(fields.get("resid_pdrop", 0.0)))

    def _positions(self, fields, max_length):
        length = self._integer(fields, "original_max_position_embeddings")
        return rotary(
            fields, max_length=max_length, partial=True, original_length=length, kinds=KINDS
        )

    def _windows(self, fields, depth):
        return (self._integer(fields, "sliding_window", optional=True),)

    def _biases(self, fields):
        return False, None

    def hf_config(self, model):
        # transformers' own pad is beyond smaller vocabularies.
        found = super().hf_config(model) | {"pad_token_id": None}
        scaling = found.get("rope_scaling")
        if scaling and "long_factor" in scaling:  # in the form that transformers 4 takes too
            length = scaling.pop("original_max_position_embeddings")
            found["original_max_position_embeddings"] = length
            scaling["type"] = scaling.pop("rope_type")
        return found

    def _more(self, model, windows):
        return {"sliding_window": windows[0], "resid_pdrop": model.dropout}

    def _matrices(self, model: Transformer) -> Iterator[Entry]:
        parts = [f"attention/{name}/w" for name in ("query", "key", "value")]
        yield joined("self_attn.qkv_proj.weight", parts)
        yield from linear("self_attn.o_proj", "attention/out")
        yield joined("mlp.gate_up_proj.weight", ["mlp/gate/w", "mlp/up/w"])
        yield from linear("mlp.down_proj", "mlp/down")
