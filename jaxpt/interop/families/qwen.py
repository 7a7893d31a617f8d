"""Qwen 2 (Yang et al. 2024) and Qwen 3 (Yang et al. 2025)."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxpt.errors import ConfigError
from jaxpt.interop.families.llama import NONE, LlamaLike, Windows

FULL, SLIDING = "full_attention", "sliding_attention"


class Qwen2(LlamaLike):
    """``Qwen2ForCausalLM``: LLaMA with biases on queries, keys and values, and windows in some
    layers."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **LlamaLike.defaults,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }

    def config(self, fields, names):
        fields.expect("use_mrope", False)
        return super().config(fields, names)

    def _biases(self, fields):
        return True, False

    def _windows(self, fields, depth):
        window = self._integer(fields, "sliding_window", optional=True)
        first = self._integer(fields, "max_window_layers")
        window = window if fields.get("use_sliding_window", False) else None
        kinds = fields.get("layer_types", None, (list, NONE))
        if kinds is None:
            kinds = [FULL if window is None or i < first else SLIDING for i in range(depth)]
        if len(kinds) != depth or not set(kinds) <= {FULL, SLIDING}:
            raise ConfigError("layer_types", f"{kinds}: give {FULL} or {SLIDING} for each layer")
        if window is None and SLIDING in kinds:
            raise ConfigError("layer_types", "some layers have a window, but there is no window")
        return tuple(window if kind == SLIDING else None for kind in kinds)

    def _more(self, model, windows):
        return _window_fields(windows)


class Qwen3(Qwen2):
    """``Qwen3ForCausalLM``: norms of each head's queries and keys."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Qwen2.defaults, "head_dim": 128}
    qk_norm = True

    def _biases(self, fields):
        return fields.get("attention_bias", False), None

    def _more(self, model, windows):
        return {"attention_bias": model.attention.bias, **_window_fields(windows)}


def _window_fields(windows: Windows) -> dict[str, Any]:
    some = [i for i, window in enumerate(windows) if window is not None]
    if not some:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": windows[some[0]],
        "max_window_layers": some[0],
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }
