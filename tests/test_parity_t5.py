"""T5 and its kin against transformers: logits, export, and the way back."""

import dataclasses

import numpy as np
import pytest
from parity import needs_transformers, prove, torch_model

from jaxpt.errors import ConfigError
from jaxpt.interop import hf

pytestmark = needs_transformers
BASE = {"vocab_size": 67, "d_model": 24, "d_kv": 7, "d_ff": 40, "num_layers": 2, "num_heads": 3}
ODD = {
    "num_layers": 3,
    "num_decoder_layers": 1,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
    "layer_norm_epsilon": 1e-3,
}
# name -> (class, fields of the config, whether the output has a matrix of its own)
CASES = {
    "t5": ("T5", {"feed_forward_proj": "relu"}, False),
    "t5_1.1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, True),
    "t5_1.1_tied": ("T5", {"feed_forward_proj": "gated-gelu", **ODD}, False),
    "ul2": ("T5", {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}, True),
    "byt5": (
        "T5",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, **ODD},
        True,
    ),
    "mt5": ("MT5", {}, True),
    "mt5_tied": ("MT5", ODD, False),
    "umt5": ("UMT5", ODD, True),
    "umt5_tied": ("UMT5", {"feed_forward_proj": "relu"}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_t5(name, tmp_path):
    import torch
    import transformers

    cls, changes, untied = CASES[name]
    config = getattr(transformers, f"{cls}Config")(decoder_start_token_id=0, **BASE | changes)
    model = torch_model(f"{cls}ForConditionalGeneration", config)
    if untied:  # transformers 5 ties all that the file does not tell apart
        head = torch.nn.Parameter(torch.randn(BASE["vocab_size"], BASE["d_model"]) / 5)
        model.lm_head.weight = head
        model.config.tie_word_embeddings = False
    family = None if cls == "T5" else cls.lower()
    wrong = name == "umt5"  # saved as not tied, it is read as not scaled
    if wrong:
        model.config.tie_word_embeddings = True
    read, config = prove(tmp_path, model, family=family, lengths=(13, 5))
    assert read.config.tied is not untied
    scaled = cls == "UMT5" or (cls == "T5" and changes.get("tie_word_embeddings", True))
    assert (read.config.logit_scale != 1.0) is scaled
    assert read.config.positions.per_layer is (cls == "UMT5")
    assert np.isclose(read.config.norm.epsilon, changes.get("layer_norm_epsilon", 1e-6))
    assert config["model_type"] == cls.lower()


def test_umt5_without_scale_is_not_written(tmp_path):
    """transformers 5 would scale its logits, whatever the config says."""
    import transformers

    config = transformers.UMT5Config(**BASE)
    torch_model("UMT5ForConditionalGeneration", config).save_pretrained(tmp_path / "theirs")
    read = hf.read(tmp_path / "theirs")
    model = hf.Model(dataclasses.replace(read.config, logit_scale=1.0), read.vocab_size)
    with pytest.raises(ConfigError, match=r"logit_scale: umt5 cannot have 1\.0"):
        hf.write(tmp_path / "out", model, read.params(), family="umt5")
    assert not list(tmp_path.glob("*out*"))
