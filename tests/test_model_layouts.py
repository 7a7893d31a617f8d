"""The Transformer's layouts, dropout, dtypes, table of tensors, patterns, FLOPs and errors."""

import dataclasses
import fnmatch
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import POSITIONS, VOCAB, derive, drawn, make_batch, states

from jaxpt.errors import ConfigError
from jaxpt.mesh import single
from jaxpt.models import (
    MLP,
    Attention,
    LayerNorm,
    Learned,
    NoPositions,
    RelativeBias,
    RMSNorm,
    Rotary,
    Transformer,
    stacking,
)
from jaxpt.models.flops import forward
from jaxpt.state import flatten
from jaxpt.weights import Dense, Normal
from jaxpt.weights.base import Record


@pytest.fixture(autouse=True)
def one_device():
    with single().active():
        yield


def initial(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed))


# --- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "remat"), [("decoder", "full"), ("encoder", "none"), ("encoder_decoder", "none")]
)
def test_scanned_equals_unrolled(kind, remat):
    changes = {
        "decoder": {"parallel": True, "parallel_norms": True, "embedding_width": 10,
                    "embedding_projection": "in_and_out"},
        "encoder": {"placement": "after"},
        "encoder_decoder": {"positions": RelativeBias(8, 12, per_layer=True)},
    }[kind]  # fmt: skip
    whole = kind == "encoder"
    attention = Attention(heads=4, window=(3, None), qk_norm=whole, qk_norm_whole=whole)
    layout = {"kind": kind, "positions": POSITIONS["relative"], "remat": remat} | changes
    scanned = derive(**layout, attention=attention)
    unrolled = dataclasses.replace(scanned, scan=False, remat="none")
    models = scanned.build(VOCAB), unrolled.build(VOCAB)
    params = [initial(m) for m in models]
    jax.tree.map(np.testing.assert_array_equal, params[0], stacking.stacked(params[1]))
    jax.tree.map(np.testing.assert_array_equal, params[1], stacking.unstacked(params[0]))
    batch = make_batch(inputs=8 if kind == "encoder_decoder" else None)

    def gradient(model, params):
        return jax.jit(jax.value_and_grad(lambda p: (model.bind(p)(batch) ** 2).sum()))(params)

    (a, da), (b, db) = (gradient(m, p) for m, p in zip(models, params, strict=True))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), da, stacking.stacked(db))


def test_a_table_for_each_layer_is_its_own_and_may_be_one_for_all():
    """umT5's relative bias: with the same table in every layer it is T5's."""
    shared, own = (derive(positions=RelativeBias(8, 12, per_layer=p)) for p in (False, True))
    params = drawn(shared.build(VOCAB))
    table = params["decoder"].pop("relative_bias")
    layers = params["decoder"]["layers"]
    each = jax.tree.map(lambda x: jnp.stack([x, x]), table)
    alike = {**params, "decoder": params["decoder"] | {"layers": layers | {"relative_bias": each}}}
    batch = make_batch()
    run = jax.jit(lambda p: own.build(VOCAB).bind(p)(batch))
    back = {**params, "decoder": params["decoder"] | {"relative_bias": table}}
    want = states(shared.build(VOCAB), back, batch)
    np.testing.assert_allclose(run(alike), want, atol=1e-6)
    for layer in (0, 1):
        other = jax.tree.map(lambda x, i=layer: x.at[i].multiply(-1), each)
        alike["decoder"]["layers"]["relative_bias"] = other
        assert np.abs(run(alike) - want).max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"first_norm": False}])
def test_unrolled_layers_would_draw_the_same_by_themselves(changes):
    model = derive(scan=False, **changes).build(VOCAB)
    each = jax.jit(lambda key: stacking.split(model._network(key, Record()))[1])(jax.random.key(0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), initial(model), each)


@pytest.mark.parametrize("remat", ["elementwise", "dots", "dots_no_batch", "branches"])
def test_remat_changes_no_gradient(remat):
    dropout = {"dropout": 0.1, "mlp": MLP(width=24, gated=True, dropout=0.2)}
    batch, key = make_batch(), jax.random.key(3)

    def gradient(config):
        model = config.build(VOCAB)
        loss = lambda p: (model.bind(p)(batch, key) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(drawn(model))

    want, got = gradient(derive(**dropout)), gradient(derive(remat=remat, **dropout))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), want, got)


def test_remat_saves_memory():
    def temporary(remat):
        config = derive(layers=8, width=32, mlp=MLP(width=512), remat=remat)
        model = config.build(VOCAB)
        batch = {"tokens": jnp.zeros((2, 64), jnp.int32)}
        loss = lambda p: model.bind(p)(batch).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(model.abstract()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary("full") < 0.5 * temporary("none")
    assert temporary("full") < temporary("elementwise") < 0.9 * temporary("none")


# --- dropout, dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "scan"), [("dropout", True), ("dropout", False), ("attention", True), ("mlp", False)]
)
def test_dropout(where, scan):
    changes = {
        "dropout": {"dropout": 0.3},
        "attention": {"attention": Attention(heads=4, dropout=0.3)},
        "mlp": {"mlp": MLP(width=24, dropout=0.3)},
    }[where]
    model, plain = derive(scan=scan, **changes).build(VOCAB), derive(scan=scan).build(VOCAB)
    params, batch = drawn(model), make_batch()
    one, again, other = (states(model, params, batch, jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    np.testing.assert_array_equal(
        states(model, params, batch), states(plain, params, batch, jax.random.key(1))
    )


def test_bfloat16_compute():
    config = derive(kind="encoder_decoder", positions=POSITIONS["relative"])
    batch = make_batch(inputs=8)
    model, low = config.build(VOCAB), derive(config, compute="bfloat16").build(VOCAB)
    params = drawn(model)
    assert states(model, params, batch).dtype == jnp.float32
    x = states(low, params, batch)
    assert x.dtype == jnp.bfloat16
    grads = jax.jit(jax.grad(lambda p: low.bind(p)(batch).astype(jnp.float32).sum()))(params)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    # Roundings of 2^-9 through four branches, of values of order one.
    np.testing.assert_allclose(x.astype(jnp.float32), states(model, params, batch), atol=0.1)


def test_parameters_in_bfloat16():
    model = derive(dtype="bfloat16").build(VOCAB)
    assert {x.dtype for x in jax.tree.leaves(initial(model))} == {jnp.dtype("bfloat16")}
    assert {t.dtype for t in model.tensors.values()} == {"bfloat16"}


# --- the table of tensors, initialisation, patterns -------------------------------------------

TABLES = {
    "everything": derive(
        kind="encoder_decoder", attention=Attention(heads=4, kv_heads=2, bias=True, qk_norm=True),
        mlp=MLP(width=24, gated=True, bias=True), norm=LayerNorm(), positions=Learned(16),
        placement="sandwich", embedding_norm=True, output_bias=True, head_transform=True,
        token_types=2,
    ),
    "relative": derive(kind="encoder_decoder", positions=RelativeBias(), scan=False),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_table_is_the_parameters(name):
    model = TABLES[name].build(VOCAB)
    params = flatten(initial(model))
    assert list(params) == list(model.tensors)
    for path, x in params.items():
        assert (x.shape, str(x.dtype)) == (model.tensors[path].shape, model.tensors[path].dtype)
        assert len(model.tensors[path].axes) == x.ndim
    assert model.parameters == sum(x.size for x in params.values())
    assert flatten(model.shardings(single())).keys() == params.keys()


def test_standard_deviations_are_as_the_table_says():
    config = Transformer(
        kind="encoder_decoder", width=128, layers=2, attention=Attention(heads=4),
        positions=RelativeBias(), vocab_multiple=1,
    )  # fmt: skip
    model = config.build(500)
    for path, x in flatten(initial(model)).items():
        want, error = model.tensors[path].std, 5 / math.sqrt(2 * x.size)
        assert float(jnp.std(x)) == pytest.approx(want, rel=error), path
    other = flatten(initial(model, seed=1))
    assert not np.allclose(other["embedding/w"], flatten(initial(model))["embedding/w"])


def test_a_tensor_more_changes_no_other():
    small = flatten(initial(derive().build(VOCAB)))
    large = flatten(initial(derive(mlp=MLP(width=24, bias=True), output_bias=True).build(VOCAB)))
    assert set(large) > set(small)
    for path, x in small.items():
        np.testing.assert_array_equal(x, large[path])


def test_vocabulary_is_padded():
    model = derive(vocab_multiple=128).build(VOCAB)
    assert model.tensors["embedding/w"].shape == (128, 16)
    x = jnp.ones((1, 1, 16))
    assert model.bind(drawn(model)).logits(x).shape == (1, 1, VOCAB)


def test_patterns():
    inits = (("*/query/w", Normal(3.0)), ("embedding/w", Normal(2.0)))
    model = derive(inits=inits).build(VOCAB)
    stds = {path: t.std for path, t in model.tensors.items()}
    assert stds["decoder/layers/attention/query/w"] == 3.0
    assert stds["embedding/w"] == 2.0
    assert stds["decoder/layers/attention/key/w"] == 0.25
    with pytest.raises(ConfigError, match=r"inits: '\*/querry/w'.*attention/query/w"):
        derive(inits=(("*/querry/w", Normal()),)).build(VOCAB)
    with pytest.raises(ConfigError, match=r"weights: '\*/mlp/\*'.*decoder/layers/mlp/up"):
        derive(weights=(("*", Dense()), ("*/mlp/*", Dense()))).build(VOCAB)
    with pytest.raises(ConfigError, match="weights: no pattern matches"):
        derive(weights=(("*/mlp/*", Dense()),)).build(VOCAB)


@pytest.mark.parametrize("scan", [True, False])
def test_every_matrix_product_is_a_weight(scan):
    model = derive(kind="encoder_decoder", scan=scan, head_transform=True).build(VOCAB)
    matrices = {p for p in model.tensors if fnmatch.fnmatch(p, "*/w")} - {"embedding/w"}
    assert matrices == {f"{path}/w" for path in model.products}


# --- FLOPs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_flops_are_those_of_the_compiled_program(kind):
    both = kind == "encoder_decoder"
    config = derive(
        kind=kind, width=128, mlp=MLP(width=512, gated=True), tied=kind == "encoder", scan=False,
        attention=Attention(heads=4, kv_heads=2, implementation="xla"), positions=NoPositions(),
        encoder_layers=1 if both else None,
    )  # fmt: skip
    model = config.build(512)
    batch = {"tokens": jax.ShapeDtypeStruct((2, 64), jnp.int32)}
    if both:
        batch["inputs"] = jax.ShapeDtypeStruct((2, 96), jnp.int32)

    def run(params, batch):
        network = model.bind(params)
        return network.logits(network(batch))

    cost = jax.jit(run).lower(model.abstract(), batch).compile().cost_analysis()
    got = model.flops(2, 96, 64) if both else model.flops(2, 64)
    # The compiler also counts norms, softmax and activations.
    assert got == pytest.approx(cost["flops"], rel=0.04)
    assert got < cost["flops"]


def test_flops_of_a_product_by_hand():
    model = derive(layers=1, attention=Attention(heads=2)).build(VOCAB)
    per_token = 2 * (4 * 16 * 16 + 2 * 16 * 24 + 16 * VOCAB)
    assert model.flops(3, 5) == 3 * (5 * per_token + 4 * 5 * 5 * 16)
    assert forward(model.config, {}, VOCAB, 1, 5, None) == 4 * 5 * 5 * 16


# --- choices that cannot work -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: derive(width=18), "attention.heads"),
        (lambda: derive(width=12), "attention.head_dim"),
        (lambda: Attention(heads=4, kv_heads=3), "kv_heads"),
        (lambda: Attention(heads=0), "heads"),
        (lambda: Attention(window=(0,)), "window"),
        (lambda: Attention(softcap=0.0), "softcap"),
        (lambda: Attention(dropout=1.0), "dropout"),
        (lambda: Attention(qk_norm_whole=True), "qk_norm_whole"),
        (lambda: derive(parallel_norms=True), "parallel_norms"),
        (lambda: derive(first_norm=False), "first_norm"),
        (lambda: Rotary(local_base=1.0), "local_base"),
        (lambda: derive(parallel=True, parallel_norms=True, placement="post"), "parallel_norms"),
        (lambda: derive(embedding_width=8, tied=True), "tied"),
        (
            lambda: derive(
                embedding_width=8, embedding_projection="in_and_out", head_transform=True
            ),
            "embedding_projection",
        ),
        (lambda: derive(layers=3, attention=Attention(heads=4, window=(2, 4))), "attention.window"),
        (lambda: derive(encoder_layers=2), "encoder_layers"),
        (lambda: derive(kind="both"), "kind"),
        (lambda: derive(layers=0), "layers"),
        (lambda: derive(logit_softcap=-1.0), "logit_softcap"),
        (lambda: MLP(activation="swish"), "activation"),
        (lambda: MLP(dropout=-0.1), "dropout"),
        (lambda: RMSNorm(epsilon=0.0), "epsilon"),
        (lambda: Rotary(base=1.0), "base"),
        (lambda: RelativeBias(buckets=6), "buckets"),
        (lambda: RelativeBias(max_distance=16), "max_distance"),
        (lambda: Learned(0), "max_length"),
        (lambda: derive(positions=Learned(8)).validate(9), "positions.max_length"),
        (lambda: derive().validate(9, 3), "target_length"),
        (lambda: derive(kind="encoder_decoder").validate(9), "target_length"),
        (lambda: derive().build(0), "vocab_size"),
    ],
)
def test_config_errors_name_the_field(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field


def test_lengths_that_fit():
    derive(positions=Learned(8)).validate(8)
    derive(kind="encoder_decoder", positions=Learned(8)).validate(8, 4)
