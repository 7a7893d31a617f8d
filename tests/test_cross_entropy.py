"""The chunked cross-entropy against one that materialises everything in float64."""

import functools
import importlib.util
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.cross_entropy import cross_entropy, pick_chunk, tpu
from kernels.platform import compiling_for

B, T, D, V = 4, 10, 16, 24
NAMES = ("x", "w", "bias", "weights")
CASES = {
    "plain": {},
    "z_loss": {"z_loss": 0.05},
    "smoothing": {"label_smoothing": 0.2},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "padding": {"vocabulary": 19},
    "all": {
        "z_loss": 0.05,
        "label_smoothing": 0.2,
        "softcap": 3.0,
        "logit_scale": 0.3,
        "vocabulary": 19,
    },
}


def data(seed=0, dtype=np.float64, shape=(B, T, D, V), ids=19):
    b, t, d, v = shape
    rng = np.random.default_rng(seed)
    arrays = {
        "x": rng.normal(size=(b, t, d)),
        "w": rng.normal(size=(d, v)),
        "bias": rng.normal(size=v),
        "weights": rng.uniform(0.5, 2, size=(b, t)) * (rng.random((b, t)) < 0.7),
    }
    targets = rng.integers(0, ids, size=(b, t)).astype(np.int32)
    return {name: a.astype(dtype) for name, a in arrays.items()}, targets


def value_and_gradients(arrays, targets, **options):
    """(total, the other outputs, gradients of 1.7 * total by name)."""

    def f(arrays):
        a = dict(arrays)
        x, w, weights = a.pop("x"), a.pop("w"), a.pop("weights")
        result = cross_entropy(x, w, targets, weights, **a, **options)
        return 1.7 * result.total, result

    (_, result), gradients = jax.jit(jax.value_and_grad(f, has_aux=True))(arrays)
    return result, gradients


def reference(arrays, targets, **options):
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        wide = {name: jnp.asarray(np.asarray(a), jnp.float64) for name, a in arrays.items()}
        result, gradients = value_and_gradients(
            wide, targets, implementation="reference", **options
        )
        assert result.total.dtype == jnp.float64
        return jax.tree.map(np.asarray, (result, gradients))


@functools.cache
def reference_of(case):
    return reference(*data(), **CASES[case])


def assert_close(actual, expected, tolerance):
    """Largest difference, relative to the largest entry of the expected array."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == e.shape
    assert np.abs(a - e).max() <= tolerance * max(np.abs(e).max(), 1e-3)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("case", "chunk", "row_shards"),
    [
        *((case, 4, 1) for case in CASES),
        *(("all", chunk, rows) for chunk, rows in [(None, 1), (4, 2), (1, 4), (T, 2)]),
    ],
)
def test_equals_float64(case, chunk, row_shards):
    arrays, targets = data()
    options = CASES[case]
    expected, gradients = reference_of(case)
    narrow = {name: a.astype(np.float32) for name, a in arrays.items()}
    result, actual = value_and_gradients(
        narrow, targets, chunk=chunk, row_shards=row_shards, **options
    )
    for name in ("total", "loss_BT", "lse_BT"):
        assert getattr(result, name).dtype == jnp.float32
        assert_close(getattr(result, name), getattr(expected, name), 2e-6)
    np.testing.assert_array_equal(result.correct_BT, expected.correct_BT)
    for name in NAMES:
        assert_close(actual[name], gradients[name], 4e-6)


def test_reference_by_hand():
    """The formula, written out for one token at a time."""
    arrays, targets = data()
    result, _ = reference_of("all")
    total = 0.0
    for b in range(B):
        for t in range(T):
            logits = 0.3 * (arrays["x"][b, t] @ arrays["w"]) + arrays["bias"]
            logits = (3 * np.tanh(logits / 3))[:19]
            log_p = logits - np.log(np.exp(logits).sum())
            target = targets[b, t]
            plain = -log_p[target]
            np.testing.assert_allclose(result.loss_BT[b, t], plain, rtol=1e-9)
            assert result.correct_BT[b, t] == (logits.argmax() == target)
            loss = 0.8 * plain + 0.2 * -log_p.mean() + 0.05 * np.log(np.exp(logits).sum()) ** 2
            total += arrays["weights"][b, t] * loss
    np.testing.assert_allclose(result.total, total, rtol=1e-9)


def test_without_differentiation_it_is_the_same():
    arrays, targets = data(dtype=np.float32)
    options = CASES["all"] | {"chunk": 3}
    result, _ = value_and_gradients(arrays, targets, **options)
    plain = jax.jit(
        lambda a: cross_entropy(a["x"], a["w"], targets, a["weights"], bias=a["bias"], **options)
    )(arrays)
    for a, b in zip(plain, result, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_only_the_total_has_gradients():
    arrays, targets = data(dtype=np.float32)

    def f(x):
        result = cross_entropy(x, arrays["w"], targets, arrays["weights"])
        return result.loss_BT.sum() + result.lse_BT.sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(f))(arrays["x"]), 0)


def test_no_weight_no_loss_and_no_gradient():
    arrays, targets = data(dtype=np.float32)
    arrays["weights"] = np.zeros((B, T), np.float32)
    result, gradients = value_and_gradients(arrays, targets, chunk=3, z_loss=0.1)
    assert result.total == 0
    for name in ("x", "w", "bias"):
        np.testing.assert_array_equal(gradients[name], 0)


def test_large_logits():
    """Logits beyond float32's range of exp."""
    arrays, targets = data()
    arrays["x"] *= 200
    expected, gradients = reference(arrays, targets)
    narrow = {name: a.astype(np.float32) for name, a in arrays.items()}
    result, actual = value_and_gradients(narrow, targets, chunk=4)
    assert_close(result.total, expected.total, 2e-6)
    for name in NAMES:
        assert_close(actual[name], gradients[name], 1e-3)


def test_bfloat16():
    """Products in bfloat16, sums in float32: rounding of inputs aside, only dlogits is rounded."""
    arrays, targets = data(dtype=np.float32, shape=(2, 64, 32, 24))
    arrays["x"] = jnp.asarray(arrays["x"], jnp.bfloat16)
    arrays["w"] = jnp.asarray(arrays["w"], jnp.bfloat16).astype(jnp.float32)
    expected, gradients = reference(arrays, targets)
    result, actual = value_and_gradients(arrays, targets, chunk=16)
    assert actual["x"].dtype == jnp.bfloat16
    assert actual["w"].dtype == jnp.float32
    assert_close(result.total, expected.total, 1e-5)
    assert_close(result.loss_BT, expected.loss_BT, 1e-5)
    assert_close(actual["x"], gradients["x"], 2**-7)
    # A sum of 128 products of rounded factors: far below one rounding of the sum itself.
    assert_close(actual["w"], gradients["w"], 2**-8)


def test_in_scan_under_remat():
    """Micro-batches in a scan, rematerialised, give the gradient of the whole."""
    arrays, targets = data(dtype=np.float32)
    _, expected = value_and_gradients(arrays, targets, chunk=5)

    def f(w):
        def step(total, row):
            x, t, weights = jax.tree.map(lambda a: a[None], row)
            loss = jax.checkpoint(lambda w: cross_entropy(x, w, t, weights, bias=arrays["bias"]))
            return total + 1.7 * loss(w).total, None

        return jax.lax.scan(step, 0.0, (arrays["x"], targets, arrays["weights"]))[0]

    assert_close(jax.jit(jax.grad(f))(arrays["w"]), expected["w"], 2e-6)


def sharded_gradients(row_shards, chunk):
    """Compiled for rows cut 4 ways and the vocabulary 2 ways, W's width cut as well."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    matrix = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    vector = NamedSharding(mesh, PartitionSpec("tensor"))
    shardings = {"x": rows, "w": matrix, "bias": vector, "weights": rows}

    def f(arrays, targets):
        result, gradients = value_and_gradients(
            arrays, targets, chunk=chunk, row_shards=row_shards, **CASES["all"]
        )
        return result.total, gradients

    return jax.jit(f, in_shardings=(shardings, rows), out_shardings=(None, shardings))


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize(("row_shards", "chunk"), [(1, None), (1, 3), (4, 3)])
def test_sharded(row_shards, chunk):
    arrays, targets = data(dtype=np.float32)
    expected, gradients = value_and_gradients(arrays, targets, **CASES["all"])
    total, actual = sharded_gradients(row_shards, chunk)(arrays, targets)
    assert_close(total, expected.total, 1e-6)
    for name in NAMES:
        assert_close(actual[name], gradients[name], 2e-6)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize(("row_shards", "inside"), [(1, True), (4, False)])
def test_row_shards_reduce_dw_once(row_shards, inside):
    """With row_shards no loop sums dW [D, V / 2] over devices, in whole or in part."""
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*data(dtype=np.float32)[0].values(),)
    ]
    arrays = dict(zip(NAMES, shapes, strict=True))
    targets = jax.ShapeDtypeStruct((B, T), jnp.int32)
    text = sharded_gradients(row_shards, 2).lower(arrays, targets).compile().as_text()
    loops = re.split(r"\n(?=ENTRY|%)", text)
    bodies = [b for b in loops if not b.startswith("ENTRY")]
    sums = re.findall(r"= \(?([^=]*?)\)? all-reduce\(", "\n".join(bodies))
    assert sums, "dx is summed over the vocabulary's shards in the loop"
    shapes = re.findall(r"f32\[([\d,]+)\]", " ".join(sums))
    sizes = [[int(n) for n in shape.split(",")] for shape in shapes]
    wide = [size for size in sizes if size[-1] == V // 2 and math.prod(size) > V]
    assert bool(wide) == inside, sizes


def test_pick_chunk():
    # 4 * 16 * 8192 bytes a position.
    assert pick_chunk(16, 256, 8192, platform="cpu") == 32
    assert pick_chunk(16, 256, 8192, platform="tpu") == 256
    assert pick_chunk(16, 2048, 32768, platform="gpu") == 256
    assert pick_chunk(16, 2048, 32768, platform="gpu", shards=8) == 2048
    assert pick_chunk(4096, 7, 10**6, platform="cpu") == 1


# ------------------------------------------------------------------------- the TPU kernel

KERNEL = {"implementation": "pallas_tpu_interpret"}
SHAPE = (2, 150, 16, 300)  # three blocks of columns, the last in part; three chunks of tokens


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "sizes_for", lambda kind: tpu.Sizes(columns=128, rows=64, depth=8))


@pytest.mark.parametrize("case", ["plain", "all"])
def test_kernel_equals_float64(case, small_blocks):
    arrays, targets = data(shape=SHAPE, ids=290)
    if case == "plain":
        arrays["x"][0, :40] *= 30  # beyond float32's range of exp, the greatest in any block
        del arrays["bias"]
    options = CASES[case] | ({"vocabulary": 290} if case == "all" else {})
    expected, gradients = reference(arrays, targets, **options)
    narrow = {name: a.astype(np.float32) for name, a in arrays.items()}
    result, actual = value_and_gradients(narrow, targets, chunk=64, **KERNEL, **options)
    for name in ("total", "loss_BT", "lse_BT"):
        assert_close(getattr(result, name), getattr(expected, name), 2e-6)
    np.testing.assert_array_equal(result.correct_BT, expected.correct_BT)
    for name in arrays:
        assert_close(actual[name], gradients[name], 2e-5)
    options |= KERNEL | {"chunk": 64}
    plain = cross_entropy(
        narrow["x"], narrow["w"], targets, narrow["weights"], bias=narrow.get("bias"), **options
    )
    assert_close(plain.lse_BT, expected.lse_BT, 2e-6)  # the first pass alone


def test_kernel_in_bfloat16(small_blocks):
    arrays, targets = data(dtype=np.float32, shape=SHAPE, ids=300)
    arrays["x"] = jnp.asarray(arrays["x"], jnp.bfloat16)
    arrays["w"] = jnp.asarray(arrays["w"], jnp.bfloat16).astype(jnp.float32)
    expected, gradients = reference(arrays, targets, softcap=20.0)
    result, actual = value_and_gradients(arrays, targets, softcap=20.0, chunk=64, **KERNEL)
    assert_close(result.loss_BT, expected.loss_BT, 1e-5)
    # The exponentials are rounded once more than elsewhere.
    assert_close(actual["x"], gradients["x"], 2**-7)
    assert_close(actual["w"], gradients["w"], 2**-8)


def test_tokens_of_a_chunk():
    sizes = tpu.sizes_for("TPU v5 lite")
    assert sizes.most_tokens(2048, 32000, jnp.bfloat16) == 1024
    assert sizes.chunk(4, 1024, 2048, 32000, jnp.bfloat16) == 256
    assert sizes.chunk(3, 1024, 2048, 32000, jnp.bfloat16) == 256  # 768 tokens
    assert sizes.chunk(1, 1100, 2048, 32000, jnp.bfloat16) == 640  # two of 550, in whole tiles
    assert sizes.chunk(1, 100, 2048, 32000, jnp.bfloat16) == 100
    assert sizes.block(32128) == 256
    assert sizes.block(2**18) == 2048
    assert tpu.sizes_for("TPU v5p").most_tokens(2048, 32000, jnp.bfloat16) == 384


def head(B, T, D, V, sharding=None):
    make = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    low = [make(s, jnp.bfloat16) for s in ((B, T, D), (D, V))]
    return *low, make((B, T), jnp.int32), make((B, T), jnp.float32)


def gradients_by_kernel(x, w, targets, weights):
    def total(x, w):
        options = {"z_loss": 1e-4, "implementation": "pallas_tpu"}
        return cross_entropy(x, w, targets, weights, **options).total

    return jax.value_and_grad(total, (0, 1))(x, w)


@pytest.mark.parametrize(
    ("kind", "width", "dtype", "devices", "kernel"),
    [
        ("TPU v5 lite", 2048, jnp.bfloat16, 1, True),
        ("TPU v5 lite", 2048, jnp.bfloat16, 4, False),
        ("TPU v5 lite", 2048, jnp.float32, 1, False),
        ("TPU v5 lite", 4096, jnp.bfloat16, 1, False),  # too few tokens fit
        ("TPU v6 lite", 2048, jnp.bfloat16, 1, False),
    ],
)
def test_choice(kind, width, dtype, devices, kernel):
    chip = types.SimpleNamespace(device_kind=kind, platform="tpu")
    x, w, targets, weights = head(4, 256, width, 32000)
    x, w = (jax.ShapeDtypeStruct(a.shape, dtype) for a in (x, w))
    with compiling_for(chip, devices):
        jaxpr = jax.make_jaxpr(lambda *a: cross_entropy(*a).total)(x, w, targets, weights)
    assert ("pallas_call" in str(jaxpr)) == kernel


def test_kernel_lowers_for_tpus_without_one():
    traced = jax.jit(gradients_by_kernel).trace(*head(4, 256, 512, 32128))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
    assert not re.search(r"tensor<([0-9]+x)+32128xf32>", text.replace("512x32128", ""))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: tpu)"
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("v5e:2x2", (4, 512, 768, 32128)),
        ("v5p:2x2x1", (4, 512, 2048, 32000)),
        ("v6e:2x2", (1, 2048, 4096, 32000)),
    ],
)
def test_kernel_compiles_for_tpus(target, shape, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    arguments = head(*shape, SingleDeviceSharding(topology.devices[0]))
    with compiling_for(topology.devices[0]):
        traced = jax.jit(gradients_by_kernel).trace(*arguments)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    batch, length, width, vocabulary = shape
    sums = 4 * width * vocabulary  # dW in float32
    rows = 2 * batch * length * width
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * sums + 4 * rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_shards": 2}, "row_shards"),
        ({"softcap": 50.0}, "softcap .above 40"),
    ],
)
def test_kernel_refuses(change, message):
    arrays, targets = data(dtype=np.float32)
    with pytest.raises(NotImplementedError, match=message):
        cross_entropy(arrays["x"], arrays["w"], targets, arrays["weights"], **KERNEL, **change)
    wide = jnp.zeros((1, 1, 2**15)), jnp.zeros((2**15, 8)), jnp.zeros((1, 1), int)
    with pytest.raises(NotImplementedError, match="width and vocabulary"):
        cross_entropy(*wide, jnp.ones((1, 1)), **KERNEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk=0"),
        ({"row_shards": 3}, "row_shards=3"),
        ({"vocabulary": V + 1}, "vocabulary=25"),
        ({"implementation": "cuda"}, "cuda"),
    ],
)
def test_refuses(options, message):
    arrays, targets = data(dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        cross_entropy(arrays["x"], arrays["w"], targets, arrays["weights"], **options)


def test_never_all_logits_at_once():
    """The compiled program's temporaries stay below the logits of the whole batch."""
    shape = (2, 512, 8, 4096)
    x, w = jnp.zeros(shape[:3]), jnp.zeros(shape[2:])
    targets, weights = jnp.zeros(shape[:2], jnp.int32), jnp.ones(shape[:2])
    whole = 4 * 2 * 512 * 4096

    def temporaries(chunk):
        f = jax.grad(lambda x, w: cross_entropy(x, w, targets, weights, chunk=chunk).total, (0, 1))
        return jax.jit(f).lower(x, w).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(32) < whole / 4
    assert temporaries(512) >= whole
