"""Weights converted into each other, one by one and in a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_low_rank import build as build_weight
from weight_cases import KEY, Matrices, matrices

from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.growth import Convert, Transition
from jaxpt.state import flatten
from jaxpt.weights import (
    Blocks,
    BlockSparse,
    Dense,
    Grouped,
    LoRA,
    LowRank,
    LowRankPlusBlockSparse,
    SparsePlusLowRank,
    Uniform,
)
from jaxpt.weights.module import merge, split

D_IN, D_OUT = 12, 20
# Weight -> the greatest error of what it takes, as a share of the matrix's largest entry.
EXACT = {
    Dense(): 0.0,
    LowRank(99): 1e-5,
    SparsePlusLowRank(99, 24.0, Grouped(4)): 1e-5,
    SparsePlusLowRank(99, 24.0, Uniform(0.2)): 1e-5,
    BlockSparse(1.0, Blocks(5, 8)): 0.0,
    LowRankPlusBlockSparse(99, 24.0, 0.2, Blocks(4, 4)): 1e-5,
    LoRA(3, 6.0): 0.0,
    LoRA(3, 6.0, "8bit"): 1 / 254 + 1e-5,
}
CUT = (LowRank(4), LowRank(0.4))  # take the nearest of their rank


@functools.cache
def functions(config):
    """(template, parameters, dense of parameters, parameters from a matrix), compiled once."""
    template, params = split(build_weight(config, D_IN, D_OUT)[0])
    dense = jax.jit(lambda params: merge(template, params).dense())
    take = jax.jit(lambda params, matrix: split(merge(template, params).from_dense(matrix))[1])
    return params, dense, take


def drawn(config, seed: int):
    """Parameters as after training: all that is not an integer is random."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=x.shape), x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x
        for name, x in functions(config)[0].items()
    }


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([*EXACT, *CUT]), st.sampled_from([*EXACT, *CUT]), st.integers(0, 2**31))
def test_any_weight_from_any_other(old, new, seed):
    """What can stand for the matrix does; what has too low a rank is the nearest."""
    matrix = np.asarray(functions(old)[1](drawn(old, seed)), np.float64)
    params = drawn(new, seed + 1)
    _, dense, take = functions(new)
    after = take(params, jnp.float32(matrix))
    assert {n: (x.shape, x.dtype) for n, x in after.items()} == {
        n: (x.shape, x.dtype) for n, x in params.items()
    }
    error = np.asarray(dense(after)) - matrix
    most = np.abs(matrix).max()
    if new in EXACT:
        assert np.abs(error).max() <= EXACT[new] * most + 1e-6
    else:
        rank = after["a"].shape[1]
        tail = np.linalg.svd(matrix, compute_uv=False)[rank:]
        assert np.linalg.norm(error) <= np.linalg.norm(tail) * (1 + 1e-4) + 1e-5 * most
    for name in params.keys() & {"indices"}:
        np.testing.assert_array_equal(after[name], params[name])  # the support stays


def converted(old, new, params, seed=2):
    key = jax.random.key(seed)
    return jax.jit(lambda params: Convert()(params, old, new, key))(params)


def model(*weights, **changes):
    return Matrices((*weights, ("*", Dense())), **changes).build(5)


@pytest.mark.parametrize("scan", [True, False])
def test_a_model_keeps_its_matrices_from_form_to_form(scan):
    chain = [
        model(scan=scan),
        model(("*/up", LoRA(4)), ("head", LowRank(99)), scan=scan),
        model(("*/up", LowRank(99)), ("*/down", LoRA(2, base="8bit")), scan=scan),
        model(("*/down", LoRA(2, base="8bit")), scan=scan, dtype="bfloat16"),
    ]
    start = params = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype),
        chain[0].abstract(),
    )
    want = matrices(chain[0], params)
    for old, new, tolerance in zip(chain, chain[1:], (1e-5, 5e-3, 1e-2), strict=False):
        Convert().validate(old, new)
        params = converted(old, new, params)
        assert {p: (t.shape, t.dtype) for p, t in new.tensors.items()} == {
            p: (x.shape, x.dtype) for p, x in flatten(params).items()
        }
        for path, matrix in matrices(new, params).items():
            np.testing.assert_allclose(matrix, want[path], atol=tolerance * np.abs(matrix).max())
        name = "layers/scale" if scan else "layers_2/scale"
        scale = np.asarray(flatten(start)[name].astype(new.config.dtype))
        np.testing.assert_array_equal(flatten(params)[name], scale)


def test_what_is_held_as_before_is_copied_bit_for_bit():
    weights = ("*/up", SparsePlusLowRank(3, 6.0, Grouped(4)))
    old, new = model(weights), model(weights, ("head", LowRank(2)))
    params = jax.jit(old.init)(KEY)
    before, after = flatten(params), flatten(converted(old, new, params))
    for path in after.keys() & before.keys():
        np.testing.assert_array_equal(after[path], before[path])
    assert after.keys() - before.keys() == {"head/a", "head/b"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (model(), model(layers=2), "layers/up holds 2 x 12 x 20, and before this phase 3 x 12"),
        (model(), model(scan=False), "layers_0/up holds 12 x 20, and before this phase nothing"),
        (model(layers=2, scan=False), model(layers=1, scan=False), "no place for layers_1/"),
    ],
)
def test_what_it_cannot_do_is_said(old, new, words):
    with pytest.raises(ConfigError, match=words) as error:
        Convert().validate(old, new)
    assert error.value.field == "model"


def test_round_trips_through_json():
    assert codec.from_json(codec.to_json(Convert()), Transition) == Convert()
