"""The Transformer: as encoder, decoder, prefix decoder or encoder-decoder; models of two."""

from jaxpt.models.attention import Attention
from jaxpt.models.base import ModelConfig
from jaxpt.models.cache import Cache
from jaxpt.models.distilled import Distilled
from jaxpt.models.electra import Discriminator, Electra
from jaxpt.models.headed import Headed, headed
from jaxpt.models.mlp import MLP
from jaxpt.models.model import Model, Network
from jaxpt.models.norm import LayerNorm, Norm, RMSNorm
from jaxpt.models.position import ALiBi, Learned, NoPositions, Positions, RelativeBias, Rotary
from jaxpt.models.scaling import (
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    RotaryScaling,
    YaRN,
)
from jaxpt.models.transformer import Transformer

__all__ = [
    "MLP",
    "ALiBi",
    "Attention",
    "Cache",
    "Discriminator",
    "Distilled",
    "DynamicNTK",
    "Electra",
    "Headed",
    "LayerNorm",
    "Learned",
    "LinearScaling",
    "Llama3Scaling",
    "LongRoPE",
    "Model",
    "ModelConfig",
    "Network",
    "NoPositions",
    "Norm",
    "Positions",
    "RMSNorm",
    "RelativeBias",
    "Rotary",
    "RotaryScaling",
    "Transformer",
    "YaRN",
    "headed",
]
