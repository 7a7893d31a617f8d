"""Decoders of transformers against ours: logits, export, the way back, and greedy continuations."""

import numpy as np
import pytest
from parity import (
    as_batch,
    assert_near,
    examples,
    logits,
    needs_transformers,
    prove,
    theirs,
    torch_model,
)

from jaxpt.data.vocabulary import Vocabulary
from jaxpt.generator import Generator
from jaxpt.interop import hf
from jaxpt.mesh import single
from jaxpt.objectives.prompt import Prompt

pytestmark = needs_transformers

EOS, PAD = 1, 0
COMMON = {"vocab_size": 67, "bos_token_id": 2, "eos_token_id": EOS, "pad_token_id": PAD}
SMALL = {
    **COMMON,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "beta_fast": 8.0}
YARN |= {"original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2, 4.0]}


def llama(**changes):
    return "Llama", SMALL | changes


def phi3(original, **changes):
    rope = LONGROPE | {"partial_rotary_factor": 0.75, "rope_theta": 1000.0}
    found = {"hidden_size": 32, "rope_parameters": rope, "sliding_window": None}
    return "Phi3", SMALL | found | {"original_max_position_embeddings": original} | changes


def falcon(**changes):
    found = {**COMMON, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    return "Falcon", found | {"ffn_hidden_size": 40} | changes


def opt(**changes):
    found = {**COMMON, "hidden_size": 20, "num_attention_heads": 4, "num_hidden_layers": 2}
    return "OPT", found | {"ffn_dim": 36, "max_position_embeddings": 24} | changes


def gpt2(**changes):
    found = {**COMMON, "n_embd": 20, "n_head": 4, "n_layer": 2, "n_positions": 24}
    return "GPT2", found | changes


# name -> (family, changes of its config)
CASES = {
    "llama": llama(),
    "llama, wide heads, tied": llama(
        head_dim=10, num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-3
    ),
    "llama, biases": llama(
        attention_bias=True, mlp_bias=True, num_key_value_heads=4, hidden_act="gelu_pytorch_tanh"
    ),
    "llama, linear": llama(rope_parameters={"rope_type": "linear", "factor": 3.0}),
    "llama, dynamic": llama(rope_parameters={"rope_type": "dynamic", "factor": 3.0}),
    "llama, llama3": llama(rope_parameters=LLAMA3, head_dim=16),
    "llama, yarn": llama(rope_parameters=YARN, head_dim=12),
    "llama, yarn, mscale": llama(
        rope_parameters=YARN | {"mscale": 1.3, "mscale_all_dim": 0.7, "truncate": False},
        head_dim=12,
    ),
    "mistral": ("Mistral", SMALL | {"sliding_window": 4, "head_dim": 14}),
    "mistral, no window": (
        "Mistral",
        SMALL | {"sliding_window": None, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "qwen2": ("Qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen2, windows": (
        "Qwen2",
        SMALL
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        | {"num_hidden_layers": 3},
    ),
    "qwen2, yarn": ("Qwen2", SMALL | {"rope_parameters": YARN, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3, windows and biases": (
        "Qwen3",
        SMALL
        | {"head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 3}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmo2": ("Olmo2", SMALL),
    "olmo2, biases": ("Olmo2", SMALL | {"attention_bias": True, "num_key_value_heads": 4}),
    "phi3, short": phi3(64),
    "phi3, long": phi3(8),
    "phi3, plain": (
        "Phi3",
        SMALL | {"sliding_window": 4, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "gpt2": gpt2(n_inner=28),
    "gpt2, untied, unscaled": gpt2(
        tie_word_embeddings=False, scale_attn_weights=False, activation_function="relu", n_head=5
    ),
    "opt": opt(),
    "opt, 350m": opt(do_layer_norm_before=False, word_embed_proj_dim=14),
    "opt, no biases": opt(
        enable_bias=False, _remove_final_layer_norm=True, tie_word_embeddings=False
    ),
    "falcon, 7b": falcon(),
    "falcon, 40b": falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon, 11b": falcon(
        new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, bias=True
    ),
    "falcon, sequential": falcon(
        parallel_attn=False, multi_query=False, bias=True, tie_word_embeddings=False
    ),
}
WRITES = [name for name in CASES if "," not in name] + ["falcon, 7b", "phi3, short"]


def made(name):
    import transformers

    family, changes = CASES[name]
    cls = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    return torch_model(cls, getattr(transformers, f"{family}Config")(**changes))


@pytest.mark.parametrize("name", CASES)
def test_decoder(name, tmp_path):
    model = made(name)
    read, written = prove(tmp_path, model, family=model.config.model_type, lengths=(13, 5))
    assert written["model_type"] == model.config.model_type
    if name in WRITES:
        continues_alike(read, model)


def continues_alike(read, model, tokens=6):
    """Greedy continuations of two prompts are the same."""
    import torch

    prompts = examples(read.vocab_size, (9, 4), seed=2)
    generator = Generator(
        read.model(), read.params(), Vocabulary(read.vocab_size, pad=PAD, eos=EOS), single()
    )
    found = generator.sample([Prompt(ids) for ids in prompts], max_tokens=tokens)
    for prompt, ours in zip(prompts, found, strict=True):
        row = torch.tensor(prompt[None])
        with torch.no_grad():
            whole = model.generate(row, do_sample=False, max_new_tokens=tokens, pad_token_id=PAD)
        wanted = whole[0, len(prompt) :].tolist()
        np.testing.assert_array_equal(ours.tokens, [t for t in wanted if t != EOS])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_beyond_the_original_length(kind, tmp_path):
    rope = {"rope_type": "dynamic", "factor": 3.0}
    family, changes = phi3(8) if kind == "longrope" else llama(rope_parameters=rope)
    CASES[kind] = family, changes | {"max_position_embeddings": 8 if kind == "dynamic" else 64}
    model = made(kind)
    model.save_pretrained(tmp_path / "theirs")
    read = hf.read(tmp_path / "theirs")
    for length in (8, 21):
        (row,) = examples(read.vocab_size, (length,))
        ours = logits(read.model(), read.params(), as_batch({"tokens": row}))
        assert_near(ours[0], theirs(model, [row])[0])
