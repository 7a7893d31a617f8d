"""Supports of an exact size, patterns, and the masked matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weights import scope

from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.mesh import Mesh
from jaxpt.weights import Blocks, Dense, Entries, FanIn, Groups, Masked
from jaxpt.weights.base import replaced
from jaxpt.weights.masked import pack, packing_axis, unpack
from jaxpt.weights.selection import top, top_of_all

PATTERNS = (Entries(), Groups(4), Blocks(3, 5))
FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf])
top_jitted = jax.jit(top, static_argnums=2)


def first(scores, count):
    """Of a flat array: the largest, of equal ones the first."""
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=24, max_size=24), st.integers(0, 26))
def test_exactly_so_many_of_the_largest(values, count):
    scores = np.float32(values)
    got = top_jitted(scores.reshape(2, 3, 4), count, (0, 1, 2))
    np.testing.assert_array_equal(np.ravel(got), first(scores, count))


def test_competitions_along_some_axes_and_counts_of_their_own():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (2, 5, 3)).astype(np.float32)  # with many ties
    counts = rng.integers(0, 6, (2, 1, 3)).astype(np.int32)
    got = np.asarray(top_jitted(scores, counts, (-2,)))
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(got[i, :, j], first(scores[i, :, j], counts[i, 0, j]))
    words = rng.integers(0, 2**32, 7, np.uint32)
    np.testing.assert_array_equal(top_jitted(words, 3, (0,)), first(words.astype(np.float64), 3))
    assert list(top_jitted(np.float32([1, np.nan, np.inf, -np.nan]), 2, (0,))) == [0, 1, 0, 1]


def test_one_competition_over_several_arrays():
    arrays = {"a": np.float32([[1, 5], [2, 2]]), "b": np.float32([2, 2, 9])}
    got = jax.jit(top_of_all)(arrays, 4)
    assert np.asarray(got["a"]).tolist() == [[False, True], [True, True]]
    assert np.asarray(got["b"]).tolist() == [False, False, True]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
def test_patterns(pattern):
    """Whatever the sides, a draw holds as many units as asked; units and entries correspond."""
    d_in, d_out = (8, 13) if isinstance(pattern, Groups) else (11, 13)
    matrix = np.random.default_rng(0).normal(size=(2, d_in, d_out)).astype(np.float32)
    grid = pattern.grid(d_in, d_out)
    count = pattern.count(0.5, d_in, d_out)
    assert count == max(1, int(0.5 * pattern.competing(d_in, d_out) + 0.5))
    drawn = np.asarray(pattern.draw(jax.random.key(0), count, d_in, d_out))
    assert drawn.shape == grid
    held = np.asarray(pattern.held(drawn))
    assert (held == count).all()
    assert held.size == pattern.competitions(d_in, d_out)
    other = np.asarray(pattern.draw(jax.random.key(1), count, d_in, d_out))
    assert (drawn != other).any()
    units = np.asarray(pattern.mean(matrix))
    assert units.shape == (2, *grid)
    back = np.asarray(pattern.spread(units, d_in, d_out))
    assert back.shape == matrix.shape
    if isinstance(pattern, Blocks):
        for i, j in np.ndindex(d_in, d_out):
            r, c = i // 3 * 3, j // 5 * 5
            want = matrix[:, r : r + 3, c : c + 5].mean((1, 2))
            np.testing.assert_allclose(back[:, i, j], want, atol=1e-6)
    else:
        np.testing.assert_array_equal(back, matrix)


def test_groups_are_consecutive_inputs():
    units = Groups(4).mean(jnp.arange(16.0).reshape(8, 2))
    np.testing.assert_array_equal(units[1, :, 1], [9, 11, 13, 15])
    mask = Groups(4).draw(jax.random.key(0), 2, 8, 2).reshape(8, 2)
    assert (np.asarray(mask)[:4].sum(0) == 2).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_bits(axis):
    mask = np.random.default_rng(0).random((13, 21)) < 0.3
    packed = np.asarray(pack(jnp.asarray(mask), axis))
    np.testing.assert_array_equal(packed, np.packbits(mask, axis=axis, bitorder="little"))
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), axis, mask.shape[axis]), mask)


def test_bits_lie_along_the_side_that_meshes_divide():
    assert [packing_axis(*shape) for shape in ((64, 48), (2736, 1024), (64, 64))] == [0, 1, 0]


def weight(config, d_in=8, d_out=12):
    at = scope((("*", config),))
    return at.weight("up", d_in, d_out, ("embed", "mlp"), FanIn()), at.record


@pytest.mark.parametrize(
    "config",
    [Masked(0.3), Masked(0.5, Groups(4)), Masked(0.4, Blocks(4, 4)), Masked(0.25, trains="all")],
    ids=lambda c: f"{type(c.pattern).__name__}-{c.trains}",
)
def test_masked(config):
    module, record = weight(config)
    mask = np.asarray(config.pattern.spread(module.support(), 8, 12))
    assert mask.sum() == int(module.entries())
    assert int(np.sum(module.support())) == config.count(8, 12) * config.pattern.competitions(8, 12)
    plain, _ = weight(Dense())
    w = np.asarray(module.w[...])
    kept = plain.w[...] if config.keeps else np.where(mask, plain.w[...], 0)
    np.testing.assert_array_equal(w, kept, err_msg="drawn as a dense matrix's entries")
    x = jax.random.normal(jax.random.key(1), (2, 3, 8))
    g = jax.random.normal(jax.random.key(2), (2, 3, 12))
    y, pull = jax.vjp(lambda w, x: replaced(module, w=w)(x), module.w[...], x)
    dw, dx = pull(g)
    full = np.einsum("bti,bto->io", x, g)
    np.testing.assert_allclose(y, x @ (w * mask), atol=1e-5)
    np.testing.assert_allclose(dx, g @ (w * mask).T, atol=1e-5)
    np.testing.assert_allclose(dw, full if config.keeps else full * mask, atol=1e-5)
    assert config.keeps or not np.asarray(dw)[~mask].any()
    np.testing.assert_array_equal(module.dense(), w * mask)
    matrix = jnp.ones((8, 12))
    np.testing.assert_array_equal(module.from_dense(matrix).dense(), mask)
    row = record.tensors["model/up/mask"]
    assert (row.dtype, row.axes, row.trained) == ("uint8", ("embed", "mlp"), False)
    assert np.prod(row.shape) * 8 == 96
    trained = sum(np.prod(t.shape) for t in record.tensors.values() if t.trained)
    assert trained == config.parameters(8, 12)


def test_scores_have_the_movement_of_their_units():
    """dL/dS = sum over the unit of dL/d(W * M) * W, held or not, and W its masked gradient."""
    config = Masked(0.4, Blocks(4, 4), trains="scores")
    module, _ = weight(config)
    x = jax.random.normal(jax.random.key(1), (5, 8))
    mask = np.asarray(config.pattern.spread(module.support(), 8, 12))
    w = module.w[...]

    def loss(w, scores):
        return jnp.sum(jnp.sin(replaced(module, w=w, scores=scores)(x)))

    dw, ds = jax.grad(loss, argnums=(0, 1))(w, module.scores[...])
    whole = np.asarray(jax.grad(lambda m: jnp.sum(jnp.sin(x @ m)))(w * mask))
    np.testing.assert_allclose(dw, whole * mask, atol=1e-5)
    want = (whole * np.asarray(w)).reshape(2, 4, 3, 4).sum((1, 3))
    np.testing.assert_allclose(ds, want, atol=1e-5)
    assert np.asarray(ds)[~np.asarray(module.support())].any()
    assert mask.sum() < 96


@pytest.mark.parametrize("trains", ["held", "all"])
def test_a_new_support(trains):
    module, _ = weight(Masked(0.5, trains=trains))
    moment = jnp.ones((8, 12))
    support = jnp.roll(module.support(), 1, axis=1)
    stay = np.asarray(module.support() & support)
    carried = functools.partial(module.carry, support=support)
    new = replaced(module, w=carried(module.w[...]), **module.places(support))
    np.testing.assert_array_equal(new.support(), support)
    kept = np.ones_like(stay) if trains == "all" else stay
    np.testing.assert_array_equal(carried(moment), kept)
    np.testing.assert_array_equal(new.numbers(), np.where(kept, module.w[...], 0))


def test_masks_lie_as_their_matrices_do():
    layout = Mesh(fsdp=2, tensor=2, data=2).build()
    module, record = weight(Masked(0.5), 32, 64)
    tensors = record.tensors
    w, mask = (layout.spec(tensors[f"model/up/{n}"].axes) for n in ("w", "mask"))
    assert w == mask
    assert module.mask[...].shape == (32, 8)


@pytest.mark.parametrize(
    ("make", "field", "message"),
    [
        (lambda: Masked(0.0), "density", "0.0 does not lie"),
        (lambda: Masked(0.3, Groups(4)), "density", "1.2, no whole number"),
        (lambda: Masked(trains="none"), "trains", "'none' is not one of"),
        (lambda: Groups(1), "size", "1 is not valid"),
        (lambda: Blocks(0, 4), "rows", "0 is not valid"),
        (lambda: weight(Masked(0.5, Groups(3 * 2))), "weights", "up: pattern.size: 6 does not"),
    ],
)
def test_errors(make, field, message):
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert error.value.field == field


def test_configs_survive_json():
    for config in (Masked(0.5, Groups(8)), Masked(1.0, Blocks(16, 32), "scores"), Masked()):
        assert codec.from_json(codec.to_json(config), Masked) == config
