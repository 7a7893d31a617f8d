"""Presets have the published numbers of parameters and train; schemes draw what they say."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import drawn

from jaxpt.mesh import single
from jaxpt.models import inits, presets
from jaxpt.state import flatten


@pytest.fixture(autouse=True)
def one_device():
    with single().active():
        yield


@pytest.mark.parametrize("preset", presets.PUBLISHED, ids=lambda f: f.__name__)
def test_parameter_counts(preset):
    vocab_size, parameters = presets.PUBLISHED[preset]
    assert preset().build(vocab_size).parameters == parameters


def test_every_preset_is_in_the_table():
    functions = {
        f
        for name, f in vars(presets).items()
        if callable(f) and getattr(f, "__module__", "") == presets.__name__ and name[0] != "_"
    }
    assert functions == set(presets.PUBLISHED)


def test_counts_without_a_published_figure_by_hand():
    """UL2's paper says 20B, GaLore's 350M and 1B: the exact figures here, from the equations."""

    def attention(width):
        return 4 * width * width

    d, f, layers, vocab = 4096, 16384, 32, 32128
    encoder = layers * (attention(d) + 3 * d * f + 2 * d) + d
    decoder = layers * (2 * attention(d) + 3 * d * f + 3 * d) + d
    ul2 = 2 * vocab * d + encoder + decoder + 2 * 32 * 16
    assert presets.PUBLISHED[presets.ul2_20b][1] == ul2
    sizes = {
        presets.llama_60m: (512, 1376, 8),
        presets.llama_130m: (768, 2048, 12),
        presets.llama_350m: (1024, 2736, 24),
        presets.llama_1b: (2048, 5461, 24),
        presets.llama_7b: (4096, 11008, 32),
        presets.llama_13b: (5120, 13824, 40),
    }
    for preset, (d, f, layers) in sizes.items():
        count = 2 * 32000 * d + layers * (attention(d) + 3 * d * f + 2 * d) + d
        assert presets.PUBLISHED[preset][1] == count


def shrunk(preset):
    """The preset, two layers of it, and narrow."""
    config = preset()
    attention = dataclasses.replace(config.attention, heads=2, head_dim=8)
    mlp = dataclasses.replace(config.mlp, width=24)
    return dataclasses.replace(config, width=16, layers=2, attention=attention, mlp=mlp)


@pytest.mark.parametrize(
    "preset",
    [presets.t5_small, presets.roberta_base, presets.gpt2_small, presets.llama_60m],
    ids=lambda f: f.__name__,
)
def test_presets_train(preset):
    model = shrunk(preset).build(32)
    tokens = jnp.arange(24).reshape(2, 12) % 32
    batch = {"tokens": tokens, "inputs": tokens}

    @jax.jit
    def step(params, key):
        def loss(params):
            network = model.bind(params)
            log = jax.nn.log_softmax(network.logits(network(batch, key)))
            return -jnp.take_along_axis(log, tokens[..., None], -1).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

    params = drawn(model)
    first = None
    for i in range(15):
        value, params = step(params, jax.random.key(i))
        first = float(value) if first is None else first
    assert first == pytest.approx(math.log(32), abs=1.0)
    assert float(value) < first - 0.1


def test_t5_scheme():
    model = presets.t5_small().build(32128)
    want = {
        "embedding/w": 1.0,
        "lm_head/w": 512**-0.5,
        "encoder/relative_bias/w": 512**-0.5,
        "encoder/layers/attention/query/w": (512 * 64) ** -0.5,
        "decoder/layers/cross_attention/query/w": (512 * 64) ** -0.5,
        "decoder/layers/cross_attention/key/w": 512**-0.5,
        "decoder/layers/attention/out/w": (6 * 64) ** -0.5,
        "decoder/layers/mlp/gate/w": 512**-0.5,
        "decoder/layers/mlp/down/w": 1024**-0.5,
        "decoder/layers/mlp_norm/scale": 0.0,
    }
    for path, std in want.items():
        assert model.tensors[path].std == pytest.approx(std), path


def test_gpt2_and_bert_schemes():
    gpt2 = presets.gpt2_small().build(50257).tensors
    residual = 0.02 / math.sqrt(24)
    for path, std in (
        ("embedding/w", 0.02),
        ("decoder/positions/w", 0.02),
        ("decoder/layers/attention/query/w", 0.02),
        ("decoder/layers/attention/out/w", residual),
        ("decoder/layers/mlp/down/w", residual),
        ("decoder/layers/mlp/down_bias", 0.0),
    ):
        assert gpt2[path].std == pytest.approx(std), path
    for model in (presets.bert_base().build(100), presets.llama_60m().build(100)):
        assert {t.std for p, t in model.tensors.items() if p.endswith("/w")} == {0.02}


def test_schemes_are_drawn():
    config = dataclasses.replace(shrunk(presets.t5_small), width=64, inits=inits.t5(8))
    model = config.build(200)
    for path, x in flatten(jax.jit(model.init)(jax.random.key(0))).items():
        error = 5 / math.sqrt(2 * x.size)
        assert np.std(x) == pytest.approx(model.tensors[path].std, rel=error), path
