"""LoRA: a frozen matrix, in its own type or in 8 bits, plus a low-rank one that is trained."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_low_rank import build
from test_steps import host_batches, program_of
from tiny import tiny_run
from weight_cases import first_state, run_steps

import kernels.product
from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.layerwise import LayerwiseStep
from jaxpt.mesh import Mesh
from jaxpt.optimizers import Group
from jaxpt.state import flatten
from jaxpt.steps import Step
from jaxpt.weights import Dense, LoRA, LowRank, Weight
from jaxpt.weights.base import replaced
from jaxpt.weights.int8 import BLOCK, dequantise, quantise
from jaxpt.weights.lora import frozen_product

BASES = ("dense", "8bit")


def with_b(module, seed=1):
    """With B other than 0, as after some steps."""
    b = jax.random.normal(jax.random.key(seed), module.b.shape, jnp.float32) / 4
    return replaced(module, b=b)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(6, 16, 3), (16, 300, 4), (5, 9, 20)])
def test_against_float64(base, d_in, d_out, rank):
    """The product, its gradients for x, A and B, and none for W0."""
    module, record = build(LoRA(rank, 7.0, base), d_in, d_out)
    module = with_b(module)
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 3, d_in)), rng.normal(size=(2, 3, d_out))
    a, b = (np.asarray(p[...], np.float64) for p in (module.a, module.b))
    scale = 7.0 / min(rank, d_in, d_out)
    if base == "8bit":
        codes, scales = np.float64(module.codes[...]), np.float64(module.scales[...])
        w0 = codes * np.repeat(scales, BLOCK, axis=1)[:, :d_out]
    else:
        w0 = np.asarray(module.w[...], np.float64)
    w, dw = w0 + scale * a @ b, np.einsum("bti,bto->io", x, g)

    def f(x, a, b):
        return replaced(module, a=a, b=b)(x)

    y, pull = jax.vjp(f, *(jnp.float32(t) for t in (x, a, b)))
    np.testing.assert_allclose(y, x @ w, atol=2e-5)
    want = (g @ w.T, scale * dw @ b.T, scale * a.T @ dw)
    for name, got, wanted in zip("xab", pull(jnp.float32(g)), want, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(module.dense(), w, atol=1e-5)
    trained = {p: t for p, t in record.tensors.items() if t.trained}
    assert {p.split("/")[-1] for p in trained} == {"a", "b"}
    assert sum(np.prod(t.shape) for t in trained.values()) == LoRA(rank).parameters(d_in, d_out)


@pytest.mark.parametrize("base", BASES)
def test_the_backward_pass_keeps_no_matrix_made_of_codes_nor_makes_a_gradient(base):
    module, _ = build(LoRA(4, 8.0, base), 64, 48)
    arrays = module._base
    x = jnp.ones((32, 64), jnp.bfloat16)
    _, pull = jax.vjp(lambda x: frozen_product(x, *arrays), x)
    kept = jax.tree.leaves(pull)
    assert {(t.shape, t.dtype) for t in kept} <= {(t.shape, t.dtype) for t in arrays}
    # The matrix of codes is made when x is there, and anew when its gradient is.
    text = str(jax.make_jaxpr(jax.grad(lambda x: frozen_product(x, *arrays).sum()))(x))
    assert text.count("optimization_barrier") == (2 if base == "8bit" else 1)
    # Nothing of W0's shape is summed over tokens, even where somebody asks for its gradient.
    if base == "dense":
        grad = jax.grad(lambda w: frozen_product(x, w).astype(jnp.float32).sum())
        assert not np.any(grad(*arrays))
        shapes = [
            (eqn.primitive.name, eqn.outvars[0].aval.shape)
            for eqn in jax.make_jaxpr(grad)(*arrays).eqns
        ]
        assert ("dot_general", (64, 48)) not in shapes


def test_starts_as_published_and_from_dense_takes_the_matrix():
    module, record = build(LoRA(4, 8.0), 64, 32)
    dense, _ = build(Dense(), 64, 32)
    np.testing.assert_array_equal(module.w[...], dense.w[...])  # the same seed, the same matrix
    np.testing.assert_array_equal(module.dense(), dense.w[...])
    assert not module.b[...].any()
    a = module.a[...]
    assert float(jnp.abs(a).max()) <= 1 / 8
    assert float(a.std()) == pytest.approx(1 / 8 / np.sqrt(3), rel=0.1)
    assert LoRA(4).flops(64, 32) == 2 * 64 * 32 + 2 * 4 * (64 + 32)
    row = record.tensors["model/up/w"]
    assert (row.weight, row.trained, row.std) == ("frozen", False, 1 / 8)
    matrix = jax.random.normal(jax.random.key(3), (64, 32))
    again = with_b(module).from_dense(matrix)
    np.testing.assert_array_equal(again.dense(), matrix)
    assert not again.b[...].any()
    np.testing.assert_array_equal(again.a[...], a)


def test_eight_bits_are_as_near_as_said():
    matrix = np.random.default_rng(0).normal(size=(7, 600)).astype(np.float32)
    matrix[3] = 0
    codes, scales = quantise(jnp.asarray(matrix))
    assert (codes.dtype, codes.shape, scales.shape) == (jnp.int8, (7, 600), (7, 3))
    again = dequantise(codes, scales, jnp.float32)
    for first in range(0, 600, BLOCK):
        block = slice(first, first + BLOCK)
        most = np.abs(matrix[:, block]).max(1)
        error = np.abs(again[:, block] - matrix[:, block]).max(1)
        assert (error <= most / 254 * (1 + 1e-5)).all()
        np.testing.assert_allclose(np.abs(again[:, block]).max(1), most, rtol=1e-6)
    codes_again, _ = quantise(again)
    np.testing.assert_array_equal(codes_again, codes)  # nothing is lost twice


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_changes_the_matrix_by_its_rounding_alone(base, dtype):
    module, _ = build(LoRA(4, 8.0, base), 24, 40)
    module = with_b(module)
    for name in ("a", "b") if base == "8bit" else ("a", "b", "w"):
        setattr(module, name, type(module.a)(getattr(module, name)[...].astype(dtype)))
    before = np.asarray(module._dense())
    merged = jax.jit(lambda key: module.merged(key)._dense())(jax.random.key(5))
    if base == "8bit":
        bound = np.abs(before).max(1, keepdims=True) / 254 * (1 + 1e-5)
    else:
        bound = np.abs(before) * 2.0 ** (-8 if dtype == "bfloat16" else -23) + 1e-7
    assert (np.abs(merged - before) <= bound).all()
    new = module.merged(jax.random.key(5))
    assert not new.b[...].any()
    assert new.a[...].dtype == dtype
    assert not np.allclose(new.a[...], module.a[...], atol=1e-3)
    again = module.merged(jax.random.key(6))
    assert not np.allclose(new.a[...], again.a[...], atol=1e-3)


def lora(base: str) -> tuple:
    return (
        ("*/attention/*", LoRA(4, 8.0, base)),
        ("*/mlp/*", LoRA(6, 6.0, "8bit")),
        ("*", Dense()),
    )


def train(run, steps=5):
    program = program_of(run)
    first = jax.device_get(first_state(program))
    losses, last = run_steps(program, host_batches(program, run, steps))
    return losses, first, jax.device_get(last), program


def test_trains_with_its_matrix_frozen_on_eight_devices_as_on_one_layer_by_layer(tmp_path):
    run = tiny_run(tmp_path, **{"model.weights": lora("dense"), "optimizer.clip": None})
    meshes = (Mesh(devices=1), Mesh(data=2, fsdp=2, tensor=2))
    one, first, last, program = train(run.replace(step=LayerwiseStep()))
    eight, *_ = train(dataclasses.replace(run, mesh=meshes[1]))
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    assert one[-1] < one[0]
    states = flatten(last.opt_state)
    before, after = flatten(first.params), flatten(last.params)
    for path, tensor in program.model.tensors.items():
        assert np.array_equal(before[path], after[path]) != tensor.trained, path
        assert any(path in key for key in states) == tensor.trained, path
    assert {t.weight for t in program.model.tensors.values()} >= {"frozen", "index"}


def test_trains_in_bfloat16_without_scan(tmp_path):
    changes = {"model.weights": lora("8bit"), "model.dtype": "bfloat16", "model.scan": False}
    losses, _, state, _ = train(tiny_run(tmp_path, **changes))
    assert losses[-1] < losses[0]
    layer = state.params["decoder"]["layers_1"]["attention"]["query"]
    assert {n: str(x.dtype) for n, x in layer.items()} == {
        "a": "bfloat16", "b": "bfloat16", "codes": "int8", "scales": "float32"
    }  # fmt: skip


@pytest.mark.parametrize("step", [Step(), LayerwiseStep()], ids=["ordinary", "layerwise"])
def test_no_gradient_of_a_frozen_matrix_is_in_the_step(monkeypatch, tmp_path, step):
    """Of the only matrices with this shape no product of the backward pass makes a gradient; where
    they are dense and not frozen by a group, some do."""
    monkeypatch.setattr(kernels.product, "_product", jnp.dot)  # as it is but on CPUs
    frozen = (Group("*/mlp/*", frozen=True),)
    for weight, groups, wanted in ((LoRA(2), (), 0), (Dense(), frozen, 0), (Dense(), (), 2)):
        changes = {"model.mlp.width": 56, "model.weights": (("*/mlp/*", weight), ("*", Dense()))}
        changes["optimizer.groups"] = groups
        program = program_of(tiny_run(tmp_path, step=step, **changes))
        key = jax.eval_shape(lambda: jax.random.key(0))
        with program.layout.active():
            traced = jax.make_jaxpr(program.step_function)(
                program.abstract, program.abstract_batch, key
            )
        made = re.findall(r"f32\[(?:16,56|56,16)\] = dot_general", str(traced))
        assert len(made) == wanted


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: LoRA(0), "rank"),
        (lambda: LoRA(1.5), "rank"),
        (lambda: LowRank(-0.5), "rank"),
        (lambda: LoRA(4, alpha=0.0), "alpha"),
        (lambda: LoRA(4, base="4bit"), "base"),  # type: ignore[arg-type]
    ],
)
def test_wrong_choices_are_named(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field


def test_a_rank_can_be_a_share_of_the_matrix():
    for share in (0.1, 0.5, 0.9):
        config = LowRank(share)
        assert 0 <= share * 64 * 48 - config.parameters(64, 48) < 64 + 48
        module, _ = build(config, 64, 48)
        assert module.a.shape[1] * (64 + 48) == config.parameters(64, 48)
    assert LowRank(0.001).parameters(8, 8) == 16  # a rank of 1 at least
    for config in (LowRank(0.5), LowRank(8), LoRA(0.25, base="8bit")):
        assert codec.from_json(codec.to_json(config), Weight) == config
