"""OLMo 2 (OLMo et al. 2025)."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxpt.interop.families.llama import LlamaLike


class Olmo2(LlamaLike):
    """``Olmo2ForCausalLM``: LLaMA with norms after the branches, and of all heads' queries and keys
    together."""

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**LlamaLike.defaults, "rms_norm_eps": 1e-5}
    norms: ClassVar[dict[str, str]] = {
        "attention_norm": "post_attention_layernorm",
        "mlp_norm": "post_feedforward_layernorm",
    }
    placement = "after"
    qk_norm = qk_norm_whole = True
