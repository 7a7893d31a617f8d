"""Small models in the form of Hugging Face's folders, made without torch."""

import dataclasses

import jax
import numpy as np
from model_cases import VOCAB, derive, perturbed

from jaxpt.data.tokenizers import Bytes
from jaxpt.interop import hf
from jaxpt.models import Attention, LayerNorm, Learned, RelativeBias
from jaxpt.models.mlp import MLP

T5 = derive(
    kind="encoder_decoder",
    positions=RelativeBias(8, 12),
    attention=Attention(heads=4, head_dim=6, scale=1.0),
    mlp=MLP(width=24, gated=True),
)
BERT = derive(
    kind="encoder",
    positions=Learned(16),
    attention=Attention(heads=4, bias=True),
    mlp=MLP(width=24, activation="gelu", bias=True),
    norm=LayerNorm(),
    placement="post",
    embedding_norm=True,
    tied=True,
    output_bias=True,
    head_transform=True,
    token_types=2,
)
LLAMA = derive(attention=Attention(heads=4, kv_heads=2), mlp=MLP(24, "silu", gated=True))
TOKENIZER = Bytes(sentinels=60)


def params_of(model):
    """On the host; rows of padding are zero, as after any import."""
    types = jax.tree.map(lambda x: x.dtype, model.abstract())
    params = jax.tree.map(lambda x, t: np.array(x, t), perturbed(model), types)
    params["embedding"]["w"][model.vocab_size :] = 0
    if "lm_head" in params and "w" in params["lm_head"]:
        params["lm_head"]["w"][:, model.vocab_size :] = 0
    return params


def written(folder, config=T5, vocab=VOCAB, **options):
    """(the model, its parameters) as they were written into ``folder``."""
    model = config.build(vocab)
    params = params_of(model)
    hf.write(folder, model, params, **options)
    return model, params


def with_tokenizer(folder, config=LLAMA):
    """A model of all ids that ``TOKENIZER`` has, and its tokenizer."""
    tokenizer = TOKENIZER.build()
    config = dataclasses.replace(config, vocab_multiple=8)
    return written(folder, config, tokenizer.vocabulary.size, tokenizer=tokenizer)
