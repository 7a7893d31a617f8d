"""Published models, as configs. Each is a function of nothing; derive from one with
``dataclasses.replace``. ``PUBLISHED`` has each one's vocabulary size and parameter count.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxpt.models import inits
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP, Activation
from jaxpt.models.norm import LayerNorm, RMSNorm
from jaxpt.models.position import Learned, RelativeBias, Rotary
from jaxpt.models.transformer import Transformer


def _t5(width, mlp, heads, layers, head_dim=64, activation: Activation = "gelu_tanh"):
    """T5 1.1: gated MLP, untied, no dropout in pretraining, scores not scaled."""
    return Transformer(
        kind="encoder_decoder",
        width=width,
        layers=layers,
        attention=Attention(heads=heads, head_dim=head_dim, scale=1.0),
        mlp=MLP(width=mlp, activation=activation, gated=True),
        norm=RMSNorm(epsilon=1e-6),
        positions=RelativeBias(buckets=32, max_distance=128),
        vocab_multiple=1,
        inits=inits.t5(head_dim),
    )


def t5_small() -> Transformer:
    """T5 1.1 small (google/t5-v1_1-small)."""
    return _t5(512, 1024, 6, 8)


def t5_base() -> Transformer:
    """T5 1.1 base (google/t5-v1_1-base)."""
    return _t5(768, 2048, 12, 12)


def t5_large() -> Transformer:
    """T5 1.1 large (google/t5-v1_1-large)."""
    return _t5(1024, 2816, 16, 24)


def t5_xl() -> Transformer:
    """T5 1.1 XL (google/t5-v1_1-xl)."""
    return _t5(2048, 5120, 32, 24)


def t5_xxl() -> Transformer:
    """T5 1.1 XXL (google/t5-v1_1-xxl)."""
    return _t5(4096, 10240, 64, 24)


def ul2_20b() -> Transformer:
    """UL2 20B (Tay et al. 2022, section 5; google/ul2): T5 1.1's layout with gated SiLU."""
    return _t5(4096, 16384, 16, 32, head_dim=256, activation="silu")


def _bert(width, layers, heads, positions: Learned, token_types: int, epsilon: float):
    """BERT with its masked-LM head; the pooler and next-sentence head are left out."""
    return Transformer(
        kind="encoder",
        width=width,
        layers=layers,
        attention=Attention(heads=heads, bias=True, dropout=0.1),
        mlp=MLP(activation="gelu", bias=True),
        norm=LayerNorm(epsilon=epsilon),
        positions=positions,
        placement="post",
        embedding_norm=True,
        tied=True,
        output_bias=True,
        head_transform=True,
        token_types=token_types,
        dropout=0.1,
        vocab_multiple=1,
        inits=inits.BERT,
    )


def bert_base() -> Transformer:
    """BERT base, uncased (Devlin et al. 2019)."""
    return _bert(768, 12, 12, Learned(512), token_types=2, epsilon=1e-12)


def bert_large() -> Transformer:
    """BERT large, uncased (Devlin et al. 2019)."""
    return _bert(1024, 24, 16, Learned(512), token_types=2, epsilon=1e-12)


def roberta_base() -> Transformer:
    """RoBERTa base (Liu et al. 2019). Positions begin at row 2 of 514, as in fairseq."""
    return _bert(768, 12, 12, Learned(512, offset=2), token_types=1, epsilon=1e-5)


def roberta_large() -> Transformer:
    """RoBERTa large (Liu et al. 2019)."""
    return _bert(1024, 24, 16, Learned(512, offset=2), token_types=1, epsilon=1e-5)


def _gpt2(width: int, layers: int, heads: int) -> Transformer:
    return Transformer(
        kind="decoder",
        width=width,
        layers=layers,
        attention=Attention(heads=heads, bias=True, dropout=0.1),
        mlp=MLP(activation="gelu_tanh", bias=True),
        norm=LayerNorm(epsilon=1e-5),
        positions=Learned(1024),
        tied=True,
        dropout=0.1,
        vocab_multiple=1,
        inits=inits.gpt2(layers),
    )


def gpt2_small() -> Transformer:
    """GPT-2 small (Radford et al. 2019)."""
    return _gpt2(768, 12, 12)


def gpt2_medium() -> Transformer:
    """GPT-2 medium."""
    return _gpt2(1024, 24, 16)


def gpt2_large() -> Transformer:
    """GPT-2 large."""
    return _gpt2(1280, 36, 20)


def gpt2_xl() -> Transformer:
    """GPT-2 XL."""
    return _gpt2(1600, 48, 25)


def _llama(width: int, mlp: int, layers: int, heads: int) -> Transformer:
    """LLaMA as the low-rank pretraining papers size it (GaLore: Zhao et al. 2024, table 5)."""
    return Transformer(
        kind="decoder",
        width=width,
        layers=layers,
        attention=Attention(heads=heads),
        mlp=MLP(width=mlp, activation="silu", gated=True),
        norm=RMSNorm(epsilon=1e-6),
        positions=Rotary(10000.0),
        vocab_multiple=1,
        inits=inits.LLAMA,
    )


def llama_60m() -> Transformer:
    """LLaMA 60M of GaLore and SLTrain."""
    return _llama(512, 1376, 8, 8)


def llama_130m() -> Transformer:
    """LLaMA 130M of GaLore and SLTrain."""
    return _llama(768, 2048, 12, 12)


def llama_350m() -> Transformer:
    """LLaMA 350M of GaLore and SLTrain."""
    return _llama(1024, 2736, 24, 16)


def llama_1b() -> Transformer:
    """LLaMA 1B of GaLore and SLTrain."""
    return _llama(2048, 5461, 24, 32)


def llama_7b() -> Transformer:
    """LLaMA 7B (Touvron et al. 2023), as GaLore and SLTrain train it too."""
    return _llama(4096, 11008, 32, 32)


def llama_13b() -> Transformer:
    """LLaMA 13B (Touvron et al. 2023)."""
    return _llama(5120, 13824, 40, 40)


# function -> (vocabulary size, parameters). Parameters are those of the published checkpoints as
# Hugging Face counts them (BERT and RoBERTa: the masked-LM model), of UL2 and the GaLore LLaMAs
# those that their published configs come to (the papers round: 20B; 58M, 134M, 368M, 1339M, 6738M).
PUBLISHED: dict[Callable[[], Transformer], tuple[int, int]] = {
    t5_small: (32128, 76_961_152),
    t5_base: (32128, 247_577_856),
    t5_large: (32128, 783_150_080),
    t5_xl: (32128, 2_849_757_184),
    t5_xxl: (32128, 11_135_332_352),
    ul2_20b: (32128, 19_591_209_984),
    bert_base: (30522, 109_514_298),
    bert_large: (30522, 335_174_458),
    roberta_base: (50265, 124_697_433),
    roberta_large: (50265, 355_412_057),
    gpt2_small: (50257, 124_439_808),
    gpt2_medium: (50257, 354_823_168),
    gpt2_large: (50257, 774_030_080),
    gpt2_xl: (50257, 1_557_611_200),
    llama_60m: (32000, 58_073_600),
    llama_130m: (32000, 134_105_856),
    llama_350m: (32000, 367_969_280),
    llama_1b: (32000, 1_339_082_752),
    llama_7b: (32000, 6_738_415_616),
    llama_13b: (32000, 13_015_864_320),
}
