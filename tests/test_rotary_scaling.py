"""Scaled rotary frequencies: against the formulas, pair by pair, and in the whole model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import VOCAB, derive, perturbed, states

from jaxpt.config.codec import from_json, to_json
from jaxpt.errors import ConfigError
from jaxpt.mesh import single
from jaxpt.models import (
    Attention,
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    Rotary,
    YaRN,
)
from jaxpt.models.position import rotary_angles, rotate
from jaxpt.models.transformer import Transformer

BASE, R = 500.0, 16
SHORT, LONG = tuple(1 + i / 10 for i in range(8)), tuple(2.0 + i for i in range(8))
LLAMA3 = Llama3Scaling(4.0, 1.0, 4.0, original_length=64)
YARN = YaRN(4.0, original_length=64, attention_factor=1.2, beta_fast=8.0)
LONGROPE = LongRoPE(SHORT, LONG, original_length=6, length=48)


@pytest.fixture(autouse=True)
def one_device():
    with single().active():
        yield


def frequencies(scaling, length=8, base=BASE):
    return Rotary(base, scaling=scaling).frequencies(R, length)[0]


PLAIN = [BASE ** (-2 * i / R) for i in range(R // 2)]


def test_plain_and_linear():
    np.testing.assert_allclose(frequencies(None), PLAIN)
    np.testing.assert_allclose(frequencies(LinearScaling(3.0)), [f / 3 for f in PLAIN])


@pytest.mark.parametrize("length", [8, 32, 33, 100])
def test_dynamic_ntk_changes_the_base(length):
    scaling = DynamicNTK(factor=2.0, original_length=32)
    reached = max(length, 32)
    base = BASE * (2 * reached / 32 - 1) ** (R / (R - 2))
    want = [base ** (-2 * i / R) for i in range(R // 2)]
    got = frequencies(scaling, length)
    np.testing.assert_allclose(got, want)
    if length > 32:  # the fastest is left, the slowest is interpolated by the growth
        assert got[0] == 1
        assert got[-1] == pytest.approx(PLAIN[-1] / (2 * length / 32 - 1))


def test_llama3_by_wavelength():
    got, kinds = frequencies(LLAMA3), set()
    for f, new in zip(PLAIN, got, strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < 64 / 4:
            want, kind = f, "left"
        elif wavelength > 64 / 1:
            want, kind = f / 4, "interpolated"
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            want, kind = (1 - smooth) * f / 4 + smooth * f, "mixed"
        kinds.add(kind)
        assert new == pytest.approx(want)
    assert kinds == {"left", "interpolated", "mixed"}


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_by_turns(truncate):
    """Peng et al. 2024, eq. 13, with the ramp over channels of the authors' code."""
    scaling = YaRN(4.0, original_length=64, beta_fast=8.0, beta_slow=0.5, truncate=truncate)
    # The channel whose frequency makes so many turns: 64 f / (2 pi) = turns, f = BASE^(-2 c / R).
    low, high = (
        R / 2 * math.log(64 / (2 * math.pi * turns)) / math.log(BASE) for turns in (8.0, 0.5)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    got = frequencies(scaling)
    ramps = [min(max((i - low) / (high - low), 0), 1) for i in range(R // 2)]
    assert {0, 1} < set(ramps)
    want = [f * ((1 - r) + r / 4) for f, r in zip(PLAIN, ramps, strict=True)]
    np.testing.assert_allclose(got, want)


def test_default_attention_factors():
    assert YaRN(4.0).magnitude == pytest.approx(0.1 * math.log(4) + 1)
    assert LongRoPE(SHORT, LONG, attention_factor=1.5).magnitude == 1.5
    assert LLAMA3.magnitude == 1


def test_longrope_takes_the_set_of_the_rows_length():
    for length, factors in ((6, SHORT), (7, LONG)):
        want = [f / by for f, by in zip(PLAIN, factors, strict=True)]
        np.testing.assert_allclose(frequencies(LONGROPE, length), want)


SCALINGS = {
    "llama3": Rotary(BASE, scaling=LLAMA3),
    "yarn, partial": Rotary(BASE, fraction=0.5, scaling=YARN),
    "longrope": Rotary(BASE, scaling=LONGROPE),
    "ntk": Rotary(BASE, scaling=DynamicNTK(2.0, original_length=4)),
}
MAGNITUDES = {"yarn, partial": 1.2, "longrope": math.sqrt(1 + math.log(48 / 6) / math.log(6))}


@pytest.mark.parametrize("name", SCALINGS)
def test_queries_and_keys_are_turned_by_the_frequencies(name):
    """Their product depends on the frequencies, the distance and the factor as a complex one."""
    rotary, rng = SCALINGS[name], np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 9, 1, R))
    positions = jnp.arange(9)[None]
    angles = rotary_angles(positions, rotary, R, 9)
    got = np.einsum("btnh,bsnh->ts", rotate(jnp.asarray(q), angles), rotate(jnp.asarray(k), angles))
    f, factor = rotary.frequencies(R, 9)
    n = len(f)
    assert 2 * n == R * rotary.fraction
    assert factor == pytest.approx(MAGNITUDES.get(name, 1.0))
    complex_q, complex_k = (x[0, :, 0, :n] + 1j * x[0, :, 0, n : 2 * n] for x in (q, k))
    distance = np.arange(9)[:, None] - np.arange(9)[None]
    turned = np.exp(1j * distance[..., None] * f)
    want = factor**2 * np.real(complex_q[:, None] * np.conj(complex_k)[None] * turned).sum(-1)
    want = want + q[0, :, 0, 2 * n :] @ k[0, :, 0, 2 * n :].T
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", SCALINGS)
def test_decoding_agrees_with_rows_as_long_as_the_cache(name):
    config = derive(
        width=32, layers=1, attention=Attention(heads=2), positions=SCALINGS[name], scan=False
    )
    model = config.build(VOCAB)
    params = perturbed(model)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 9)))
    want = states(model, params, {"tokens": tokens})
    cache = model.bind(params).init_cache(2, 9)
    step = jax.jit(lambda t, c: model.bind(params).decode(t, c))
    first, cache = step(tokens[:, :4], cache)
    second, cache = step(tokens[:, 4:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), want, atol=2e-5)


@pytest.mark.parametrize("name", SCALINGS)
def test_configs_go_to_json_and_back(name):
    config = derive(width=32, attention=Attention(heads=2), positions=SCALINGS[name])
    assert from_json(to_json(config), Transformer) == config


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: LinearScaling(0.5), "factor"),
        (lambda: DynamicNTK(2.0, original_length=0), "original_length"),
        (lambda: Llama3Scaling(8.0, 4.0, 4.0), "high_frequency_factor"),
        (lambda: YaRN(2.0, beta_fast=1.0, beta_slow=2.0), "beta_fast"),
        (lambda: YaRN(2.0, attention_factor=0.0), "attention_factor"),
        (lambda: LongRoPE((1.0, 0.0), (1.0, 1.0)), "short"),
        (lambda: LongRoPE(SHORT, LONG, original_length=64, length=32), "length"),
        (lambda: derive(positions=Rotary(scaling=LONGROPE)), "positions.scaling.short"),
        (lambda: Rotary(fraction=0.0), "fraction"),
        (lambda: derive(positions=Rotary(fraction=0.2)), "attention.head_dim"),
    ],
)
def test_config_errors_name_the_field(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field
