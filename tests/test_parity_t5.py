"""T5 and its kin against transformers: logits, export, and the way back."""

import numpy as np
import pytest
from parity import needs_transformers, prove, torch_model

pytestmark = needs_transformers
BASE = {"vocab_size": 67, "d_model": 24, "d_kv": 7, "d_ff": 40, "num_layers": 2, "num_heads": 3}
CASES = {
    "t5": {"feed_forward_proj": "relu"},
    "t5_1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "ul2": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False, "num_layers": 3},
    "byt5": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_layers": 3,
        "num_decoder_layers": 1,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 11,
        "layer_norm_epsilon": 1e-3,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_t5(name, tmp_path):
    import torch
    import transformers

    changes = {"decoder_start_token_id": 0, **BASE, **CASES[name]}
    model = torch_model("T5ForConditionalGeneration", transformers.T5Config(**changes))
    untied = changes.get("tie_word_embeddings") is False
    if untied:  # transformers 5 ties all that is not told apart by the file
        head = torch.nn.Parameter(torch.randn(BASE["vocab_size"], BASE["d_model"]) / 5)
        model.lm_head.weight = head
        model.config.tie_word_embeddings = False
    read, config = prove(tmp_path, model, lengths=(13, 5))
    assert read.config.tied is not untied
    assert (read.config.logit_scale == 1.0) is untied
    assert config["tie_word_embeddings"] is not untied
    assert np.isclose(read.config.norm.epsilon, changes.get("layer_norm_epsilon", 1e-6))
