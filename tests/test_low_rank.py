"""Low-rank and sparse-plus-low-rank weights: what they start from, hold and convert into."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_run

from jaxpt.errors import ConfigError
from jaxpt.program import Program
from jaxpt.weights import Dense, FanIn, Grouped, LowRank, SparsePlusLowRank, Uniform
from jaxpt.weights.base import Record, Rules, Scope

AXES = ("embed", "mlp")


def build(config, d_in, d_out, seed=0):
    record = Record()
    scope = Scope(jax.random.key(seed), Rules((("*", config),)), record, path="model")
    return scope.weight("up", d_in, d_out, AXES, FanIn()), record


def test_support_is_as_dense_as_asked_and_differs_by_layer():
    for seed in range(3):
        grouped = Grouped(32).draw(jax.random.key(seed), 64, 256)
        assert grouped.dtype == jnp.uint8
        assert grouped.shape == (64, 8)
        assert int(grouped.max()) < 32
        uniform = Uniform(0.03).draw(jax.random.key(seed), 64, 256)
        assert len(np.unique(uniform)) == round(0.03 * 64 * 256)
        assert (np.diff(uniform) > 0).all()
    # Every place of a group is as likely as any: 3 standard deviations of 8192 draws.
    many = np.asarray(Grouped(16).draw(jax.random.key(9), 512, 256)).ravel()
    counts = np.bincount(many, minlength=16)
    assert np.abs(counts - 512).max() < 4 * np.sqrt(512)


@pytest.mark.parametrize(
    "config",
    [
        LowRank(3),
        LowRank(3, "plain"),
        LowRank(3, "spectral_ones"),
        SparsePlusLowRank(3, 8.0, Grouped(8)),
        SparsePlusLowRank(3, 8.0, Uniform(0.1)),
    ],
    ids=str,
)
def test_from_dense_inverts_dense(config):
    module, record = build(config, 24, 16)
    if isinstance(config, SparsePlusLowRank):  # with B = 0 there would be nothing of low rank
        module.b[...] = jax.random.normal(jax.random.key(1), module.b.shape) / 4
    matrix = module.dense()
    again = module.from_dense(matrix)
    assert float(jnp.abs(again.dense() - matrix).max()) < 2e-3 * float(jnp.abs(matrix).max())
    x = jax.random.normal(jax.random.key(2), (5, 24))
    np.testing.assert_allclose(again(x), x @ matrix, atol=2e-2)
    trained = sum(np.prod(t.shape) for t in record.tensors.values() if t.trained)
    assert trained == config.parameters(24, 16)


def test_initialisations_of_low_rank():
    full, _ = build(LowRank(99), 12, 8)  # more than there can be: the matrix itself
    drawn = full.dense()
    u, s, vt = np.linalg.svd(drawn)
    cut, _ = build(LowRank(3), 12, 8)
    np.testing.assert_allclose(cut.dense(), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    np.testing.assert_allclose(cut.a[...].T @ cut.a[...], np.diag(s[:3]), atol=1e-5)
    ones, _ = build(LowRank(3, "spectral_ones"), 12, 8)
    np.testing.assert_allclose(np.linalg.svd(ones.dense())[1][:4], [1, 1, 1, 0], atol=1e-5)
    np.testing.assert_allclose(ones.dense(), u[:, :3] @ vt[:3], atol=1e-5)
    plain, record = build(LowRank(16, "plain"), 256, 512)
    assert float(plain.dense().std()) == pytest.approx(1 / 16, rel=0.05)
    assert record.tensors["model/up/a"].std == pytest.approx(float(plain.a[...].std()), rel=0.05)


def test_sltrain_starts_as_published():
    module, record = build(SparsePlusLowRank(4, 8.0, Uniform(0.5)), 64, 32)
    assert not module.b[...].any()
    for tensor in (module.a[...], module.values[...]):
        assert float(jnp.abs(tensor).max()) <= 1 / 8
        assert float(tensor.std()) == pytest.approx(1 / 8 / np.sqrt(3), rel=0.1)
    assert record.tensors["model/up/indices"].trained is False


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: LowRank(0), "rank"),
        (lambda: LowRank(4, "svd"), "init"),  # type: ignore[arg-type]
        (lambda: SparsePlusLowRank(0), "rank"),
        (lambda: SparsePlusLowRank(4, alpha=0.0), "alpha"),
        (lambda: Grouped(257), "size"),
        (lambda: Uniform(0.0), "density"),
        (lambda: build(SparsePlusLowRank(4, support=Uniform()), 2**16, 2**15), "weights"),
    ],
)
def test_wrong_choices_are_named(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field


def test_no_scatter_of_a_train_step_has_repeated_or_unordered_indices(tmp_path):
    """Either support, both passes. The embedding's gradient alone adds rows up by their ids."""
    inner = (("*/attention/*", Grouped(8)), ("*/mlp/*", Uniform(0.1)))
    weights = tuple((path, SparsePlusLowRank(4, 8.0, support)) for path, support in inner)
    run = tiny_run(tmp_path, **{"model.weights": (*weights, ("*", Dense()))})
    program = Program(run, 0, run.tokenizer.build().vocabulary, run.mesh.build())
    key = jax.eval_shape(lambda: jax.random.key(0))
    with program.layout.active():
        step = jax.jit(program.step_function).trace(program.abstract, program.abstract_batch, key)
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    scatters = re.findall(r'stablehlo\.scatter"\(.*?<{(.*?)}>.*?: \((tensor<[^>]*>)', text, re.S)
    embedding = f"tensor<{program.model.tensors['embedding/w'].shape[0]}x16xf32>"
    assert len([of for _, of in scatters if of == embedding]) == 1
    others = [flags for flags, of in scatters if of != embedding]
    assert len(others) == 2 * 2  # of in and out, forward and backward; one layer's text
    for flags in others:
        assert "indices_are_sorted = true" in flags
        assert "unique_indices = true" in flags
