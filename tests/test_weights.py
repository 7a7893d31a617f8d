"""Weights, initialisers and the scope that modules make their tensors in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpt.errors import ConfigError
from jaxpt.models import stacking
from jaxpt.weights import (
    Constant,
    Dense,
    FanIn,
    Grouped,
    Normal,
    SparsePlusLowRank,
    XavierUniform,
)
from jaxpt.weights.base import Record, Rules, Scope
from jaxpt.weights.product import product

DENSE = (("*", Dense()),)


def scope(weights=DENSE, inits=(), **changes):
    return Scope(jax.random.key(0), Rules(weights, inits, **changes), Record(), path="model")


@pytest.mark.parametrize(("d_in", "d_out"), [(4, 6), (6, 4), (5, 5)])
@pytest.mark.parametrize("leading", [(7,), (2, 3), (2, 2, 2)])
def test_product(d_in, d_out, leading):
    keys = jax.random.split(jax.random.key(1), 3)
    x, w, g = (
        jax.random.normal(k, s)
        for k, s in zip(keys, ((*leading, d_in), (d_in, d_out), (*leading, d_out)), strict=True)
    )
    y, pull = jax.vjp(product, x, w)
    want, want_pull = jax.vjp(jnp.matmul, x, w)
    np.testing.assert_allclose(y, want, atol=1e-5)
    for a, b in zip(pull(g), want_pull(g), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_product_in_bfloat16_keeps_the_weights_gradient_in_float32():
    x, w = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((4, 2))
    assert product(x, w).dtype == jnp.bfloat16
    dx, dw = jax.grad(lambda x, w: product(x, w).astype(jnp.float32).sum(), argnums=(0, 1))(x, w)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


def test_product_has_second_derivatives():
    x, w = jax.random.normal(jax.random.key(0), (3, 4)), jnp.eye(4)

    def bent(f):
        return lambda w: jnp.sin(f(jnp.tanh(f(x, w)), w)).sum()

    got, want = (
        jax.jvp(jax.grad(bent(f)), (w,), (jnp.ones_like(w),))[1] for f in (product, jnp.matmul)
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_dense():
    at = scope()
    weight = at.weight("up", 4, 6, ("embed", "mlp"), FanIn())
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    np.testing.assert_allclose(weight(x), x @ weight.dense(), atol=1e-5)
    other = weight.from_dense(jnp.ones((4, 6)))
    want = jnp.broadcast_to(x.sum(-1, keepdims=True), (2, 3, 6))
    np.testing.assert_allclose(other(x), want, atol=1e-5)
    assert not np.allclose(weight.dense(), 1), "the weight itself stays as it was"
    row = at.record.tensors["model/up/w"]
    assert (row.shape, row.axes, row.std, row.weight) == ((4, 6), ("embed", "mlp"), 0.5, "Dense")
    assert not row.stacked
    (made,) = at.record.products.values()
    assert (made.d_in, made.d_out, made.stack, made.weight.flops(4, 6)) == (4, 6, 1, 48)


def test_stacked_and_single_layers_draw_the_same():
    def layer(at):
        class Layer(nnx.Module):
            def __init__(self):
                self.up = at.weight("up", 4, 6, ("embed", "mlp"), FanIn())

        return stacking.split(Layer())[1]["up"]["w"]

    at = scope() / "layers"
    stacked = jax.vmap(lambda key: layer(at.stacked(key, 3)))(at.layer_keys(3))
    alone = [layer(at.layer(i)) for i in range(3)]
    np.testing.assert_array_equal(stacked, jnp.stack(alone))
    assert not np.allclose(stacked[0], stacked[1])
    tensors = at.record.tensors
    assert tensors["model/layers/up/w"].shape == (3, 4, 6)
    assert tensors["model/layers/up/w"].axes == ("layers", "embed", "mlp")
    assert tensors["model/layers/up/w"].stacked
    assert tensors["model/layers_2/up/w"].shape == (4, 6)
    assert at.record.products["model/layers/up"].stack == 3


def test_first_matching_rule_wins():
    class Other(Dense):
        pass

    weights = (("*/up", Other()), ("*", Dense()))
    inits = (("*/up/w", Normal(3.0)), ("*/w", Normal(2.0)))
    at = scope(weights, inits)
    for name in ("up", "down"):
        at.weight(name, 4, 4, ("embed", "mlp"), FanIn())
    assert at.record.tensors["model/up/w"].weight == "Other"
    assert at.record.tensors["model/down/w"].weight == "Dense"
    assert at.record.tensors["model/up/w"].std == 3.0
    assert at.record.tensors["model/down/w"].std == 2.0
    used = {
        (field, p) for field, rules in (("weights", weights), ("inits", inits)) for p, _ in rules
    }
    assert at.record.used == used
    with pytest.raises(ConfigError, match=r"model/gate; matrices so far: model/gate"):
        scope((("*/up", Dense()),)).weight("gate", 4, 4, (None, None), FanIn())


def test_rules_reach_weights_that_hold_no_matrix():
    """A rule for PATH/w says how the matrix is drawn, whatever the weight's own tensors are."""

    class Spy(Dense):
        def build(self, scope, d_in, d_out, axes, init):
            seen.append(init)
            return super().build(scope, d_in, d_out, axes, init)

    seen = []
    scope((("*", Spy()),), (("*/w", Normal(3.0)),)).weight("up", 4, 4, (None, None), FanIn())
    assert seen == [Normal(3.0)]


@pytest.mark.parametrize("init", [Constant(2.0), Normal(0.3), FanIn(2.0), XavierUniform()])
def test_initialisers(init):
    x = init(jax.random.key(0), (80, 500), 80, 500, jnp.float32)
    assert np.std(x) == pytest.approx(init.std(80, 500), rel=0.02, abs=1e-6)
    assert np.mean(x) == pytest.approx(2.0 if isinstance(init, Constant) else 0, abs=0.01)
    assert init(jax.random.key(0), (2,), 1, 1, jnp.bfloat16).dtype == jnp.bfloat16


def test_fan_ins_by_hand():
    assert FanIn().std(16, 3) == 0.25
    assert FanIn(0.25).std(16, 3) == 0.125
    assert XavierUniform().std(3, 5) == 0.5


def test_a_support_that_is_drawn_anew_is_the_same():
    """Two words in the place of the indices; same values, same matrix, same gradients."""
    made = []
    for stored in (True, False):
        weights = (("*", SparsePlusLowRank(2, 4.0, Grouped(4, stored=stored))),)
        made.append(scope(weights).weight("up", 8, 10, ("embed", "mlp"), FanIn()))
    assert made[0].indices[...].shape == (8, 3)
    assert made[1].indices[...].nbytes == 8
    x = jax.random.normal(jax.random.key(1), (3, 8))
    a, b = (m.dense() for m in made)
    assert np.count_nonzero(a) == 24
    np.testing.assert_array_equal(a, b)
    grads = [jax.grad(lambda x, m=m: jnp.square(m(x)).sum())(x) for m in made]
    np.testing.assert_array_equal(*grads)
