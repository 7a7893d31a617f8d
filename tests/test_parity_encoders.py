"""BERT, RoBERTa and ModernBERT against transformers: logits, export, and the way back."""

import numpy as np
import pytest
from parity import needs_transformers, prove, torch_model

from jaxpt.interop import hf
from jaxpt.interop.safetensors import SafeTensors, write
from jaxpt.state import flatten

pytestmark = needs_transformers
BASE = {"vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
BERT = {**BASE, "intermediate_size": 40, "max_position_embeddings": 24}
MODERN = {**BASE, "num_hidden_layers": 4, "intermediate_size": 28, "pad_token_id": 0}
MODERN |= {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
CASES = {
    "bert": ("Bert", BERT),
    "bert_odd": (
        "Bert",
        {
            **BERT,
            "hidden_size": 15,
            "num_hidden_layers": 3,
            "hidden_act": "relu",
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-3,
            "max_position_embeddings": 14,
        },
    ),
    "roberta": ("Roberta", {**BERT, "type_vocab_size": 1}),
    "roberta_odd": (
        "Roberta",
        {**BERT, "pad_token_id": 4, "hidden_size": 21, "max_position_embeddings": 40},
    ),
    "modernbert": ("ModernBert", {**MODERN, "local_attention": 6}),
    "modernbert_odd": (
        "ModernBert",
        {
            **MODERN,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "local_attention": 8,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "decoder_bias": False,
            "norm_eps": 1e-3,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 777.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 33.0},
            },
        },
    ),
    "modernbert_global": ("ModernBert", {**MODERN, "layer_types": ["full_attention"] * 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_encoder(name, tmp_path):
    import transformers

    cls, changes = CASES[name]
    config = getattr(transformers, f"{cls}Config")(**changes)
    model = torch_model(f"{cls}ForMaskedLM", config)
    pad = changes.get("pad_token_id", 1 if cls == "Roberta" else 0)
    read, written = prove(tmp_path, model, lengths=(12, 5), pad=pad)
    assert written["model_type"] == cls.lower()
    if cls == "Roberta":
        assert read.config.positions.offset == pad + 1
    if cls == "ModernBert":
        assert "attention_norm" not in read.params()["encoder"]["layers_0"]


def test_old_names_and_parts_of_no_use(tmp_path):
    """BERT's first files call scales gamma, and carry a head for pairs of sentences."""
    import transformers

    model = torch_model("BertForPreTraining", transformers.BertConfig(**BERT))
    model.save_pretrained(tmp_path / "a")
    old = SafeTensors(tmp_path / "a" / "model.safetensors")
    names = {
        n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("m.bias", "m.beta") for n in old
    }
    assert any(n.startswith("bert.pooler") for n in old)
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "model.safetensors", {names[n]: old[n] for n in old})
    (tmp_path / "a" / "config.json").rename(tmp_path / "b" / "config.json")
    assert any(name.endswith("LayerNorm.beta") for name in names.values())
    (tmp_path / "a" / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes())
    a, b = (flatten(hf.read(tmp_path / name).params()) for name in "ab")
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])
