"""Decoder families without transformers: published configs, what is refused, files and back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from model_cases import VOCAB, derive, perturbed

from jaxpt.errors import ConfigError, DataError
from jaxpt.interop import hf, safetensors
from jaxpt.interop.families import FAMILIES
from jaxpt.interop.family import essence, expressed
from jaxpt.interop.fields import Fields
from jaxpt.interop.rope import rotary, rotary_fields
from jaxpt.models import (
    MLP,
    ALiBi,
    Attention,
    DynamicNTK,
    LayerNorm,
    Learned,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    RMSNorm,
    Rotary,
    YaRN,
    presets,
)
from jaxpt.models.model import Model
from jaxpt.state import flatten


def config_of(model_type, raw):
    fields = Fields({"model_type": model_type, "vocab_size": 100, **raw})
    fields.get("vocab_size")
    found = FAMILIES[model_type].config(fields, ())
    fields.finish(FAMILIES[model_type].harmless)
    return found


def heads(width, inner, layers, count, groups=None):
    found = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return found | {"num_attention_heads": count, "num_key_value_heads": groups or count}


# What config.json of published models says that matters, and as much of the rest as has to be
# known to be harmless: (family, fields, vocabulary, parameters as Hugging Face counts them).
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PUBLISHED = {
    "Llama-2-7b": (
        "llama",
        heads(4096, 11008, 32, 32) | {"pretraining_tp": 1, "rope_scaling": None},
        32000,
        6_738_415_616,
    ),
    "Llama-3.2-1B": (
        "llama",
        heads(2048, 8192, 16, 32, 8)
        | {"head_dim": 64, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "mlp_bias": False}
        | {"tie_word_embeddings": True, "attention_bias": False, "rms_norm_eps": 1e-5},
        128256,
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        "mistral",
        heads(4096, 14336, 32, 32, 8) | {"sliding_window": 4096, "rope_theta": 10000.0},
        32000,
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        heads(896, 4864, 24, 14, 2)
        | {"tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False}
        | {"max_window_layers": 24, "sliding_window": 32768, "rope_theta": 1000000.0},
        151936,
        494_032_768,
    ),
    "Qwen3-0.6B": (
        "qwen3",
        heads(1024, 3072, 28, 16, 8)
        | {"head_dim": 128, "tie_word_embeddings": True, "attention_bias": False}
        | {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28},
        151936,
        596_049_920,
    ),
    "OLMo-2-1B": ("olmo2", heads(2048, 8192, 16, 16), 100352, 1_484_916_736),
    "Phi-3-mini-128k": (
        "phi3",
        heads(3072, 8192, 32, 32)
        | {"rope_scaling": LONG, "original_max_position_embeddings": 4096}
        | {"max_position_embeddings": 131072, "sliding_window": 262144, "attention_bias": False}
        | {"embd_pdrop": 0.0, "resid_pdrop": 0.0},
        32064,
        3_821_079_552,
    ),
    "gpt2": (
        "gpt2",
        {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_ctx": 1024, "n_positions": 1024}
        | {"summary_type": "cls_index", "task_specific_params": {}, "attn_pdrop": 0.1},
        50257,
        124_439_808,
    ),
    "opt-125m": (
        "opt",
        {"hidden_size": 768, "ffn_dim": 3072, "prefix": "</s>", "activation_dropout": 0.0},
        50272,
        125_239_296,
    ),
    "opt-350m": (
        "opt",
        {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"do_layer_norm_before": False, "word_embed_proj_dim": 512},
        50272,
        331_196_416,
    ),
    "falcon-7b": (
        "falcon",
        {"hidden_size": 4544, "num_attention_heads": 71, "multi_query": True, "alibi": False}
        | {"apply_residual_connection_post_layernorm": False, "parallel_attn": True},
        65024,
        6_921_720_704,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_published_parameters(name):
    family, raw, vocab_size, parameters = PUBLISHED[name]
    config = dataclasses.replace(config_of(family, raw), vocab_multiple=1)
    assert Model(config, vocab_size).parameters == parameters


def test_what_published_configs_come_to():
    models = {name: config_of(family, raw) for name, (family, raw, *_) in PUBLISHED.items()}
    assert models["Llama-3.2-1B"].positions == Rotary(500000.0, scaling=Llama3Scaling(32.0))
    assert models["Mistral-7B-v0.1"].attention.window == (4096,)
    assert models["Qwen2.5-0.5B"].attention.out_bias is False
    assert models["Qwen2.5-0.5B"].attention.window == ()
    assert models["Phi-3-mini-128k"].positions.scaling.length == 131072
    assert models["falcon-7b"].attention.kv_heads == 1
    assert essence(models["gpt2"]) == essence(presets.gpt2_small())


def test_windows_of_qwens_later_layers():
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    found = config_of("qwen2", {"num_hidden_layers": 3, **windows})
    assert found.attention.window == (None, 5, 5)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    found = config_of("qwen2", {"num_hidden_layers": 3, **windows, "layer_types": kinds})
    assert found.attention.window == (5, None, None)


REFUSED = {
    "rope_scaling.rope_type": ("llama", {"rope_scaling": {"type": "xpos"}}),
    "rope_scaling.factor": ("llama", {"rope_scaling": {"type": "linear"}}),
    "rope_parameters.alpha": ("llama", {"rope_parameters": {"rope_theta": 1e4, "alpha": 2.0}}),
    "rope_parameters.factor": ("llama", {"rope_parameters": {"type": "linear", "factor": "2"}}),
    "rope_scaling": ("llama", {"rope_scaling": {"type": "linear"}, "rope_parameters": {"a": 1}}),
    "partial_rotary_factor": ("llama", {"partial_rotary_factor": 0.5}),
    "hidden_act": ("llama", {"hidden_act": "quick_gelu"}),
    "num_attention_heads": ("llama", {"hidden_size": 100, "head_dim": 8}),
    "sliding_window": ("llama", {"sliding_window": 4}),
    "attention_bias": ("mistral", {"attention_bias": True}),
    "layer_types": ("qwen2", {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}),
    "use_mrope": ("qwen2", {"use_mrope": True}),
    "lm_head_bias": ("phi3", {"lm_head_bias": True}),
    "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "add_cross_attention": ("gpt2", {"add_cross_attention": True}),
    "embd_pdrop": ("gpt2", {"embd_pdrop": 0.3}),
    "layer_norm_elementwise_affine": ("opt", {"layer_norm_elementwise_affine": False}),
    "layerdrop": ("opt", {"layerdrop": 0.1}),
    "alibi": ("falcon", {"alibi": True}),
    "num_kv_heads": ("falcon", {"multi_query": False, "num_kv_heads": 2}),
    "num_ln_in_parallel_attn": ("falcon", {"num_ln_in_parallel_attn": 2}),
    "parallel_attn": ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}),
    "is_encoder_decoder": ("olmo2", {"is_encoder_decoder": True}),
}


@pytest.mark.parametrize("field", REFUSED)
def test_variants_are_refused_by_name(field):
    with pytest.raises(ConfigError) as error:
        config_of(*REFUSED[field])
    assert error.value.field == field


@pytest.mark.parametrize("name", ["phi3", "qwen3", "mistral", "opt", "gpt2", "falcon", "olmo2"])
def test_unknown_fields_are_refused(name):
    with pytest.raises(ConfigError, match="not understood") as error:
        config_of(name, {"some_new_field": 3})
    assert error.value.field == "some_new_field"


ROTARIES = {
    "plain": Rotary(123.0),
    "linear": Rotary(scaling=LinearScaling(2.5)),
    "dynamic": Rotary(scaling=DynamicNTK(2.0, 64)),
    "llama3": Rotary(scaling=Llama3Scaling(2.0, 1.5, 3.0, 16)),
    "yarn": Rotary(scaling=YaRN(2.0, 16, beta_fast=8.0, truncate=False)),
    "yarn with a factor": Rotary(scaling=YaRN(2.0, 16, attention_factor=1.25)),
    "longrope": Rotary(fraction=0.5, scaling=LongRoPE((1.0, 2.0), (3.0, 4.0), 16, 48)),
    "longrope with a factor": Rotary(scaling=LongRoPE((1.0,), (3.0,), 16, 48, 1.25)),
}


@pytest.mark.parametrize("name", ROTARIES)
def test_rotary_positions_in_both_forms(name):
    """``rope_theta`` and ``rope_scaling``, as written; and ``rope_parameters``."""
    positions = ROTARIES[name]
    written = json.loads(json.dumps(rotary_fields(positions)))
    length = written.pop("max_position_embeddings", 100)
    assert rotary(Fields(written), max_length=length, partial=True) == positions
    one = (written.pop("rope_scaling") or {}) | written
    fields = Fields({"rope_parameters": one})
    assert rotary(fields, max_length=length, partial=True) == positions


def test_defaults_of_scalings():
    """What transformers takes where a scaling does not say."""
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    found = rotary(Fields({"rope_scaling": yarn}), max_length=128).scaling
    assert found == YaRN(4.0, 32)
    given = rotary(
        Fields({"rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}}), max_length=128
    )
    assert given.scaling.magnitude == 1
    long = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    found = rotary(Fields({"rope_scaling": long | {"factor": 16.0}}), max_length=4096).scaling
    assert found.magnitude == pytest.approx(np.sqrt(1 + np.log(16) / np.log(4096)))


# --- files and back ---------------------------------------------------------------------------

GATED = {"mlp": MLP(width=24, activation="silu", gated=True), "norm": RMSNorm(1e-5)}
LAYERNORM = {"norm": LayerNorm(), "positions": Rotary(300.0)}
GROUPED = Attention(heads=4, kv_heads=2)
BOTH = {"embedding_width": 10, "embedding_projection": "in_and_out"}
# name -> (the family that it is exported as, changes)
MODELS = {
    "llama": ("llama", GATED | {"attention": GROUPED}),
    "llama, unrolled, tied": ("llama", GATED | {"tied": True, "scan": False}),
    "mistral": ("mistral", GATED | {"attention": Attention(heads=4, kv_heads=1, window=(3,))}),
    "qwen2": ("qwen2", GATED | {"attention": Attention(heads=4, bias=True, out_bias=False)}),
    "qwen2, windows": (
        "qwen2",
        GATED | {"attention": Attention(heads=4, bias=True, out_bias=False, window=(None, 3))},
    ),
    "qwen3": ("qwen3", GATED | {"attention": Attention(heads=4, head_dim=6, qk_norm=True)}),
    "olmo2": (
        "olmo2",
        GATED
        | {"attention": Attention(heads=4, qk_norm=True, qk_norm_whole=True)}
        | {"placement": "after"},
    ),
    "phi3": (
        "phi3",
        GATED
        | {
            "attention": Attention(heads=2),
            "positions": Rotary(fraction=0.75),
            "vocab_multiple": 8,
        },
    ),
    "gpt2": (
        "gpt2",
        {"norm": LayerNorm(), "mlp": MLP(width=24, bias=True), "positions": Learned(16)}
        | {"attention": Attention(heads=4, bias=True), "tied": True},
    ),
    "opt": (
        "opt",
        {"norm": LayerNorm(), "mlp": MLP(width=24, activation="relu"), "tied": True}
        | {"positions": Learned(16, offset=2), "placement": "post"}
        | BOTH,
    ),
    "falcon": (
        "falcon",
        LAYERNORM | {"attention": GROUPED, "parallel": True, "parallel_norms": True},
    ),
    "falcon, one norm": (
        "falcon",
        LAYERNORM | {"attention": Attention(heads=4, kv_heads=1), "parallel": True, "tied": True},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_written_and_read_again(name, tmp_path):
    wanted, changes = MODELS[name]
    model = derive(**changes).build(VOCAB)
    params = perturbed(model)
    family = hf.write(tmp_path / "out", model, params)
    assert family.model_type == wanted
    read = hf.read(tmp_path / "out")
    assert essence(read.config) == essence(model.config)
    back = read.params(model.config)
    for path, array in flatten(params).items():
        rows = VOCAB if "vocab" in model.tensors[path].axes else None
        axis = model.tensors[path].axes.index("vocab") if rows else 0
        found = np.take(flatten(back)[path], range(rows or array.shape[0]), axis)
        np.testing.assert_array_equal(found, np.take(array, range(rows or array.shape[0]), axis))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"positions": ALiBi()}, "positions"),
        ({"placement": "sandwich"}, "placement"),
        ({"attention": Attention(heads=4, softcap=2.0)}, "attention.softcap"),
        ({"attention": Attention(heads=4, window=(2, 3))}, "attention.window"),
        ({"embedding_norm": True}, "embedding_norm"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"kind": "encoder"}, "kind"),
    ],
)
def test_models_that_a_family_has_not_are_refused_by_our_name(changes, field):
    for name in ("llama", "mistral", "qwen2", "olmo2", "phi3", "gpt2", "opt", "falcon"):
        with pytest.raises(ConfigError):
            expressed(FAMILIES[name], derive(**GATED | changes), VOCAB)
    with pytest.raises(ConfigError) as error:
        expressed(FAMILIES["mistral"], derive(**GATED | changes), VOCAB)
    assert error.value.field == f"model.{field}"


def test_files_without_the_heads_prefix(tmp_path):
    """As GPT-2's are: saved from the model without its head."""
    changes = MODELS["gpt2"][1]
    model = derive(**changes).build(VOCAB)
    params = perturbed(model)
    hf.write(tmp_path / "out", model, params)
    file = safetensors.SafeTensors(tmp_path / "out" / "model.safetensors")
    arrays = {name.removeprefix("transformer."): np.array(file[name]) for name in file}
    arrays["h.0.attn.bias"] = np.zeros((1, 1, 16, 16), np.float32)  # a mask of old versions
    safetensors.write(tmp_path / "out" / "model.safetensors", arrays, {"format": "pt"})
    read = hf.read(tmp_path / "out").params(model.config)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_a_fused_matrix_of_a_wrong_shape(tmp_path):
    _, changes = MODELS["falcon"]
    model = derive(**changes).build(VOCAB)
    hf.write(tmp_path / "out", model, perturbed(model))
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_kv_heads": 4}))
    with pytest.raises(DataError, match="query_key_value"):
        hf.read(tmp_path / "out")
