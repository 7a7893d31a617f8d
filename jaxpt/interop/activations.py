"""Names of activations in config.json, and ours."""

from __future__ import annotations

from jaxpt.models.mlp import Activation

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
# Ours -> the name to write: the first of several.
NAMES: dict[str, str] = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
