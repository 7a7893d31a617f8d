"""Cached decoding equals the forward pass, for every position scheme, kind and prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import POSITIONS, VOCAB, derive, make_batch, perturbed, states

from jaxpt.mesh import single
from jaxpt.models import Attention


@pytest.fixture(autouse=True)
def one_device():
    with single().active():
        yield


def decoder_of(model, params):
    """decode(tokens, cache, segments, prefix), compiled."""

    @functools.partial(jax.jit)
    def decode(tokens, cache, segments=None, prefix=None):
        return model.bind(params).decode(tokens, cache, segments=segments, prefix=prefix)

    return decode


def one_by_one(decode, tokens, cache, segments=None):
    out = []
    for t in range(tokens.shape[1]):
        step = None if segments is None else segments[:, t : t + 1]
        x, cache = decode(tokens[:, t : t + 1], cache, step)
        out.append(x)
    return jnp.concatenate(out, 1), cache


LAYERS = {
    "rotary": {"placement": "after", "qk_norm_whole": True},
    "learned": {"embedding_width": 10, "embedding_projection": "in_and_out", "out_bias": True},
    "alibi": {"parallel": True, "parallel_norms": True, "scan": False},
}


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_decoder(positions, prefixed):
    changes = dict(LAYERS.get(positions, {}))
    inside = {k: changes.pop(k) for k in ("qk_norm_whole", "out_bias") if k in changes}
    attention = Attention(heads=4, kv_heads=2, window=(5, None), qk_norm=True, **inside)
    config = derive(positions=POSITIONS[positions], attention=attention, **changes)
    model = config.build(VOCAB)
    params = perturbed(model)
    tokens = make_batch(9)["tokens"]
    prefix = jnp.zeros_like(tokens).at[:, :4].set(int(prefixed))
    want = states(model, params, {"tokens": tokens, "prefix": prefix})
    decode = decoder_of(model, params)
    cache = model.bind(params).init_cache(2, 12)
    prompt, cache = decode(tokens[:, :4], cache, None, prefix[:, :4])
    rest, cache = one_by_one(decode, tokens[:, 4:], cache)
    np.testing.assert_allclose(jnp.concatenate([prompt, rest], 1), want, atol=2e-5)
    assert cache.index.tolist() == [9, 9]


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_encoder_decoder(positions, scan):
    config = derive(
        kind="encoder_decoder", positions=POSITIONS[positions], encoder_layers=2, scan=scan
    )
    model = config.build(VOCAB)
    params = perturbed(model)
    batch = make_batch(6, inputs=8)
    ones = jnp.ones_like
    batch |= {"segments": ones(batch["tokens"]), "positions": jnp.tile(jnp.arange(6), (2, 1))}
    batch["input_segments"] = (batch["input_segments"] == 1).astype(jnp.int32)
    want = states(model, params, batch)

    @jax.jit
    def start(params):
        network = model.bind(params)
        segments = batch["input_segments"]
        return network.init_cache(2, 6, encoded=network.encode(batch), input_segments=segments)

    got, _ = one_by_one(decoder_of(model, params), batch["tokens"], start(params))
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("positions", ["relative", "learned"])
def test_prompts_of_different_lengths(positions):
    """Padding at the end of a shorter prompt is overwritten by what the row says next."""
    model = derive(positions=POSITIONS[positions]).build(VOCAB)
    params = perturbed(model)
    tokens = make_batch(8)["tokens"]
    decode = decoder_of(model, params)
    lengths = jnp.array([[3], [5]])
    prompt = (jnp.arange(5)[None] < lengths).astype(jnp.int32)
    first, cache = decode(tokens[:, :5], model.bind(params).init_cache(2, 8), prompt)
    assert cache.index.tolist() == [3, 5]
    following = jnp.stack([tokens[0, 3:6], tokens[1, 5:8]])
    rest, _ = one_by_one(decode, following, cache)
    for row, length in enumerate((3, 5)):
        got = jnp.concatenate([first[row, :length], rest[row]])
        want = states(model, params, {"tokens": tokens[row : row + 1, : length + 3]})[0]
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_rows_that_are_done_stay_as_they_are():
    model = derive().build(VOCAB)
    params = perturbed(model)
    tokens = make_batch(4)["tokens"]
    decode = decoder_of(model, params)
    _, cache = decode(tokens, model.bind(params).init_cache(2, 8))
    _, after = decode(tokens[:, :1], cache, jnp.array([[1], [0]]))
    assert after.index.tolist() == [5, 4]
    np.testing.assert_array_equal(after.segments[1], cache.segments[1])


@pytest.mark.smoke
def test_rows_of_a_cache_can_be_taken():
    """As beam search does: the rows chosen go on as if they had always been there."""
    config = derive(kind="encoder_decoder", positions=POSITIONS["relative"])
    model = config.build(VOCAB)
    params = perturbed(model)
    batch = make_batch(3, inputs=5)
    network = model.bind(params)
    decode = decoder_of(model, params)
    _, cache = decode(batch["tokens"], network.init_cache(2, 8, encoded=network.encode(batch)))
    rows = jnp.array([1, 1, 0])
    following = jnp.array([[4], [5], [6]])
    got, taken = decode(following, cache.take(rows))
    for i, row in enumerate(rows):
        want, _ = decode(following[i : i + 1], cache.take(row[None]))
        np.testing.assert_allclose(got[i], want[0], atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 1e-3
    assert taken.cross_segments.shape == (3, 5)


def test_cache_dtype_and_kinds():
    model = derive().build(VOCAB)
    network = model.bind(perturbed(model))
    assert network.init_cache(1, 4).keys.dtype == jnp.float32
    cache = network.init_cache(1, 4, jnp.bfloat16)
    x, cache = network.decode(jnp.array([[3, 4]]), cache)
    assert (x.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)
    encoder = derive(kind="encoder").build(VOCAB)
    with pytest.raises(ValueError, match="encoder does not decode"):
        encoder.bind(perturbed(encoder)).init_cache(1, 4)
    both = derive(kind="encoder_decoder").build(VOCAB)
    with pytest.raises(ValueError, match="encoded"):
        both.bind(perturbed(both)).init_cache(1, 4)
