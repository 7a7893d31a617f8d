"""Block-sparse products: every implementation against numpy in float64, and what it compiles to."""

import functools
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from kernels import benchmark
from kernels.block_sparse import (
    Split,
    block_sparse_matmul,
    chosen,
    gather,
    joined,
    norms,
    sharded_block_sparse,
    spread,
)
from kernels.block_sparse.benchmark import break_even
from kernels.block_sparse.places import in_a_step, places_of, steps_of
from kernels.platform import compiling_for

XLA, TPU, GPU = "xla", "pallas_tpu_interpret", "pallas_gpu_interpret"
NAMES = ("y", "dx", "dblocks")
UNSERVED, HALF = NotImplementedError, jnp.ones((2, 8), jnp.float16)


def places(rng, n, high, wide):
    """n places in a grid, distinct and in no order."""
    at = rng.permutation(high * wide)[:n]
    return (at // wide).astype(np.int32), (at % wide).astype(np.int32)


def dense(blocks, rows, columns, d_in, d_out):
    """The matrix in numpy, block by block."""
    (_, bi, bo), size = blocks.shape, (d_in + blocks.shape[1], d_out + blocks.shape[2])
    w = np.zeros(size)
    for block, i, j in zip(blocks, rows, columns, strict=True):
        w[i * bi : (i + 1) * bi, j * bo : (j + 1) * bo] = block
    return w[:d_in, :d_out]


def held(w, rows, columns, block):
    """Blocks of a matrix, 0 beyond its edge."""
    bi, bo = block
    w = np.pad(w, ((0, bi), (0, bo)))
    return np.stack(
        [
            w[i * bi : (i + 1) * bi, j * bo : (j + 1) * bo]
            for i, j in zip(rows, columns, strict=True)
        ]
    )


@functools.cache
def both_passes(name, d_out):
    @jax.jit
    def run(x, blocks, rows, columns, g):
        def f(x, blocks):
            return block_sparse_matmul(x, blocks, rows, columns, d_out, implementation=name)

        y, pull = jax.vjp(f, x, blocks)
        return y, *pull(g)

    return run


def compare(name, lead, d_in, d_out, block, n, seed=0, dtype="float32", tolerance=1e-4):
    rng = np.random.default_rng(seed)
    high, wide = -(-d_in // block[0]), -(-d_out // block[1])
    rows, columns = places(rng, n, high, wide)
    x, g = rng.normal(size=(*lead, d_in)), rng.normal(size=(*lead, d_out))
    blocks = rng.normal(size=(n, *block))
    w = dense(blocks, rows, columns, d_in, d_out)
    dw = x.reshape(-1, d_in).T @ g.reshape(-1, d_out)
    want = x @ w, g @ w.T, held(dw, rows, columns, block)
    given = [jnp.asarray(a, dtype) for a in (x, blocks, rows, columns, g)]
    given[2:4] = jnp.asarray(rows), jnp.asarray(columns)
    got = both_passes(name, d_out)(*given)
    for of, a, e in zip(NAMES, got, want, strict=True):
        assert a.dtype == jnp.dtype(dtype), of
        error = np.abs(np.asarray(a, np.float64) - e).max() / max(1.0, np.abs(e).max())
        assert error < tolerance, f"{name}: {of}"


# ------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("name", [XLA, TPU, GPU, "reference"])
@pytest.mark.parametrize(
    ("lead", "d_in", "d_out", "n"),
    [
        pytest.param((5,), 300, 260, 1, id="one block, and edges"),
        pytest.param((2, 65), 256, 384, 6, id="all blocks"),
        pytest.param((3,), 380, 250, 4, id="empty rows and columns"),
    ],
)
def test_the_product_and_its_gradients(name, lead, d_in, d_out, n):
    compare(name, lead, d_in, d_out, (128, 128), n, seed=n)


@pytest.mark.parametrize("name", [XLA, GPU])
@pytest.mark.parametrize(("block", "n"), [((32, 64), 5), ((64, 16), 9), ((32, 32), 1)], ids=str)
def test_small_and_rectangular_blocks(name, block, n):
    compare(name, (70,), 100, 130, block, n)


def test_blocks_of_any_shape_by_xla():
    compare(XLA, (2, 3), 7, 11, (2, 3), 9)


@pytest.mark.parametrize("name", [XLA, TPU, GPU])
def test_bfloat16(name):
    """Sums in float32: the error is that of rounding what goes in and comes out."""
    compare(name, (40,), 256, 300, (128, 128), 4, dtype="bfloat16", tolerance=2e-2)


@pytest.mark.parametrize("name", [XLA, TPU, GPU])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.sampled_from([2, 7]))
def test_any_support(name, seed, n):
    """One program for all of them: places are arrays."""
    block = (128, 128) if name == TPU else (16, 16)
    compare(name, (4,), 3 * block[0], 4 * block[1], block, n, seed=seed)


def test_a_full_column_takes_several_steps_and_a_short_one_a_part(monkeypatch):
    monkeypatch.setattr("kernels.block_sparse.xla.ROWS", 12)
    both_passes.cache_clear()
    for seed in range(3):
        compare(XLA, (4,), 4 * 10, 3 * 3, (4, 3), 17, seed=seed)
    both_passes.cache_clear()


def test_gradients_come_in_the_blocks_dtype_without_a_second_rounding():
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(512, 32)), jnp.bfloat16) for _ in range(2))
    at = jnp.arange(2), jnp.arange(2)
    dx, dw = both_passes(XLA, 32)(x, jnp.ones((2, 16, 16)), *at, g)[1:]
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    exact = held(np.asarray(x, np.float64).T @ np.asarray(g, np.float64), *at, (16, 16))
    np.testing.assert_allclose(dw, exact, atol=1e-3)


@pytest.mark.parametrize("name", [XLA, GPU])
def test_second_derivatives(name):
    """Of a function that is not linear in either argument, against the dense matrix's."""
    rng = np.random.default_rng(0)
    rows, columns = (jnp.asarray(a) for a in places(rng, 3, 2, 3))
    x, blocks = jnp.float32(rng.normal(size=(4, 32))), jnp.float32(rng.normal(size=(3, 16, 16)))

    def bent(name):
        def f(x, blocks):
            y = block_sparse_matmul(jnp.tanh(x), blocks, rows, columns, 48, implementation=name)
            return jnp.sum(jnp.sin(y) * (1 + blocks.sum()))

        def squares(x, blocks):
            return sum(jnp.sum(d**2) for d in jax.grad(f, argnums=(0, 1))(x, blocks))

        return jax.jit(jax.grad(squares, argnums=(0, 1)))

    for got, want in zip(bent(name)(x, blocks), bent("reference")(x, blocks), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("name", [XLA, GPU])
def test_stacked_layers_by_scan_and_by_vmap(name):
    rng = np.random.default_rng(0)
    layers, n, d = 3, 4, 48
    pairs = [places(rng, n, 3, 3) for _ in range(layers)]
    rows, columns = (jnp.asarray(np.stack(a)) for a in zip(*pairs, strict=True))
    blocks = jnp.float32(rng.normal(size=(layers, n, 16, 16)))
    x = jnp.float32(rng.normal(size=(layers, 2, 3, d)))
    product = functools.partial(block_sparse_matmul, d_out=d, implementation=name)

    def loss(blocks, mapped):
        each = (x, blocks, rows, columns)
        if mapped:
            y = jax.vmap(product)(*each)
        else:
            y = jax.lax.scan(lambda c, args: (c, product(*args)), 0, each)[1]
        return jnp.sum(jnp.sin(y))

    def want(blocks):
        w = jax.vmap(lambda b, r, c: spread(b, r, c, d, d))(blocks, rows, columns)
        return jnp.sum(jnp.sin(jnp.einsum("lbti,lio->lbto", x, w)))

    expected = jax.grad(want)(blocks)
    for mapped in (True, False):
        got = jax.jit(jax.grad(functools.partial(loss, mapped=mapped)))(blocks)
        np.testing.assert_allclose(got, expected, atol=1e-4)


# ------------------------------------------------------------------------------- the places


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    each=st.integers(1, 4),
)
def test_steps_hold_every_block_once_column_by_column(seed, grid, each):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, grid[0] * grid[1] + 1))
    at = places_of(*places(rng, n, *grid))
    steps = steps_of(at, grid[1], each)
    found = [i for ids, k in zip(steps.ids, steps.held, strict=True) for i in ids[:k]]
    np.testing.assert_array_equal(found, at.by_column)
    assert (np.diff(at.columns[found]) >= 0).all()
    begin = 0
    for column, end in enumerate(steps.ends):
        assert (steps.column[begin:end] == column).all()
        assert (at.columns[steps.ids[begin:end][:, 0]] == column).all()
        assert steps.held[begin:end].sum() == (at.columns == column).sum()
        begin = end


def test_steps_of_arrays_of_jax_are_the_same_and_then_hold_nothing():
    rng = np.random.default_rng(0)
    for _ in range(5):
        at = places(rng, 7, 4, 5)
        got = jax.jit(lambda *at: steps_of(places_of(*at), 5, 2))(*map(jnp.asarray, at))
        want = steps_of(places_of(*at), 5, 2)
        np.testing.assert_array_equal(got.ends, want.ends)
        for a, e in zip(got[:4], want[:4], strict=True):
            np.testing.assert_array_equal(a[: len(e)], e)
        assert not np.asarray(got.held)[len(want.ids) :].any()


def test_equal_columns_leave_no_step_half_empty():
    assert in_a_step(7 * 8, 7, 128, 1024) == 8
    assert in_a_step(7 * 12, 7, 128, 1024) == 6
    assert in_a_step(3, 7, 128, 1024) == 1


def test_spread_gather_norms_and_parts():
    rng = np.random.default_rng(0)
    rows, columns = places(rng, 5, 3, 4)
    blocks = rng.normal(size=(5, 4, 3)).astype(np.float32)
    w = np.asarray(spread(jnp.asarray(blocks), jnp.asarray(rows), jnp.asarray(columns), 11, 10))
    np.testing.assert_array_equal(w, dense(blocks, rows, columns, 11, 10).astype(np.float32))
    inside = held(w, rows, columns, (4, 3))
    np.testing.assert_array_equal(gather(jnp.asarray(w), rows, columns, (4, 3)), inside)
    got = norms(jnp.asarray(w), (4, 3))
    np.testing.assert_allclose(got[rows, columns], (inside**2).sum((1, 2)), rtol=1e-5)
    assert np.count_nonzero(got) == 5
    # A grid of 4 x 6 in 2 x 3 parts of 2 x 2, with one block each.
    at = jnp.asarray(rng.integers(0, 2, (2, 2, 3, 1)))
    flat, rows, columns = joined(jnp.arange(6).reshape(2, 3, 1, 1, 1), at[0], at[1], (4, 6))
    np.testing.assert_array_equal(flat.ravel(), range(6))
    np.testing.assert_array_equal(rows // 2, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(columns // 2, [0, 1, 2, 0, 1, 2])


# ------------------------------------------------------------------------------ many devices


@pytest.mark.parametrize("ways", [(1, 4), (2, 2)])
def test_devices_with_their_own_parts_equal_one(ways):
    rng = np.random.default_rng(0)
    gi, gj, m = 2, 4, 3
    parts = [places(rng, m, 2, 3) for _ in range(gi * gj)]
    rows, columns = (jnp.asarray(np.stack(a)).reshape(gi, gj, m) for a in zip(*parts, strict=True))
    blocks = jnp.float32(rng.normal(size=(gi, gj, m, 4, 8)))
    d_in, d_out = gi * 2 * 4, gj * 3 * 8
    x, g = (jnp.float32(rng.normal(size=(4, 2, d))) for d in (d_in, d_out))
    devices = np.array(jax.devices())[: 2 * ways[0] * ways[1]].reshape(2, *ways)
    mesh = Mesh(devices, ("data", "rows", "columns"))

    def on_all(x, blocks):
        split = Split(("data",), "rows", "columns")
        return sharded_block_sparse(x, blocks, rows, columns, d_out, mesh=mesh, split=split)

    def on_one(x, blocks):
        grid = (gi * 2, gj * 3)
        return block_sparse_matmul(x, *joined(blocks, rows, columns, grid), d_out)

    got, want = (
        jax.jit(lambda x, b, f=f: (lambda y, pull: (y, *pull(g)))(*jax.vjp(f, x, b)))(x, blocks)
        for f in (on_all, on_one)
    )
    for name, a, e in zip(NAMES, got, want, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-4, err_msg=name)


def test_parts_that_devices_do_not_divide_are_named():
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    at = jnp.zeros((3, 1, 1), jnp.int32)
    with pytest.raises(ValueError, match="12 rows in 3 parts of blocks of 4 cannot be cut over 2"):
        sharded_block_sparse(
            jnp.ones((1, 12)), jnp.ones((3, 1, 1, 4, 4)), at, at, 4,
            mesh=mesh, split=Split((None,), "rows"),
        )  # fmt: skip


# ------------------------------------------------------------------------------ for the chips


def gradients(x, blocks, rows, columns, d_out, name):
    def f(x, blocks):
        y = block_sparse_matmul(x, blocks, rows, columns, d_out, implementation=name)
        return y.astype(jnp.float32).sum()

    return jax.grad(f, argnums=(0, 1))(x, blocks)


def traced(name, make=jax.ShapeDtypeStruct, tokens=256, d_in=512, d_out=640, n=9, side=128):
    shapes = (
        make((tokens, d_in), jnp.bfloat16),
        make((n, side, side), jnp.float32),
        make((n,), jnp.int32),
        make((n,), jnp.int32),
    )
    step = functools.partial(gradients, d_out=d_out, name=name)
    return jax.jit(step).trace(*shapes)


def test_no_scatter_of_the_xla_path_has_repeated_or_unordered_indices():
    text = traced(XLA, side=64, n=30).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" in text
    assert "stablehlo.scatter" not in text


@pytest.mark.parametrize(
    ("name", "platform", "call"),
    [("pallas_tpu", "tpu", "tpu_custom_call"), ("pallas_gpu", "cuda", "xla.gpu.triton")],
)
def test_lowers_without_the_chip(name, platform, call):
    text = traced(name).lower(lowering_platforms=(platform,)).as_text()
    # The forward pass's result is not needed: dx and dW.
    assert text.count(call) == 2


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: tpu)"
)
@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(("d_in", "d_out", "n"), [(2048, 5461, 172), (4096, 11008, 688)])
def test_compiles_for_tpus(target, d_in, d_out, n, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    sharding = SingleDeviceSharding(topology.devices[0])
    make = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    with compiling_for(topology.devices[0]):
        assert chosen(make((4096, d_in), jnp.bfloat16), make((n, 128, 128), "f4"), d_out) == (
            "pallas_tpu"
        )
        program = traced("pallas_tpu", make, 4096, d_in, d_out, n)
    compiled = program.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 2
    # Transposed and padded copies, and dW in float32; nothing of the dense matrix's size twice.
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 2 * 4096 * (d_in + d_out) + 2**27


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="the CUDA plugin is not installed (extra: cuda12)",
)
@pytest.mark.slow
@pytest.mark.parametrize(("side", "n"), [(128, 172), (64, 688), (32, 2752)])
def test_compiles_for_gpus(side, n):
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding
    from test_attention_gpu import H100

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    make = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    program = traced("pallas_gpu", make, 4096, 2048, 5461, n, side)
    compiled = program.lower(lowering_platforms=("cuda",)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**28


# ------------------------------------------------------------------- choices, errors, tables


def test_the_choice_by_platform():
    """CPUs have no kernel; one with several devices, which XLA cuts, takes none."""

    class Device:
        platform, device_kind, compute_capability = "tpu", "TPU v5e", "9.0"

    x, blocks = jax.ShapeDtypeStruct((8, 256), "f4"), jax.ShapeDtypeStruct((1, 128, 128), "f4")
    small = jax.ShapeDtypeStruct((1, 64, 64), "f4")
    assert chosen(x, blocks, 256) == "xla"
    device = Device()
    with compiling_for(device):
        assert chosen(x, blocks, 256) == "pallas_tpu"
        assert chosen(x, small, 256) == "xla"
    with compiling_for(device, 4):
        assert chosen(x, blocks, 256) == "xla"
    device.platform = "gpu"
    with compiling_for(device):
        assert chosen(x, small, 256) == "pallas_gpu"
        device.compute_capability = "10.0"
        assert chosen(x, small, 256) == "xla"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocks": jnp.ones((4, 4))}, ValueError, "blocks[4, 4] are not"),
        ({"rows": jnp.zeros(2, jnp.int32)}, ValueError, "rows[2] and columns[1]"),
        ({"x": jnp.ones((2, 3)), "d_out": 4}, ValueError, "2 blocks of 4 x 4 do not fit"),
        ({"implementation": "cuda"}, ValueError, "unknown implementation 'cuda'"),
        ({"implementation": "pallas_tpu"}, UNSERVED, "'pallas_tpu' does not serve this block"),
        ({"implementation": "pallas_gpu"}, UNSERVED, "'pallas_gpu' does not serve this block"),
        ({"x": HALF, "implementation": "pallas_gpu"}, UNSERVED, "does not serve this dtype"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, error, message):
    given = {
        "x": jnp.ones((2, 8)),
        "blocks": jnp.ones((2 if "2 blocks" in message else 1, 4, 4)),
        "rows": jnp.zeros(2 if "2 blocks" in message else 1, jnp.int32),
        "columns": jnp.zeros(2 if "2 blocks" in message else 1, jnp.int32),
        "d_out": 8,
    }
    with pytest.raises(error, match=re.escape(message)):
        block_sparse_matmul(**(given | change))


def test_the_benchmark_prints_what_it_measured(capsys):
    """At a size where times mean nothing; what is counted does."""
    argv = ["block_sparse", "--json", "--shapes", "64x96", "--tokens", "32", "--blocks", "16"]
    benchmark.main([*argv, "--densities", "0.25", "--rounds", "1", "--round-seconds", "0"])
    found = json.loads(capsys.readouterr().out)["rows"]
    names = [row["by"] for row in found]
    assert names == ["xla", "forward breaks even", "backward breaks even"]
    assert found[0]["density"] == 0.25
    for label, flops in (("forward", 2), ("backward", 4)):
        rate = flops * 32 * 64 * 96 * 0.25 / found[0][f"{label} ms"] * 1e3 / 1e12
        assert found[0][f"{label} TFLOP/s"] == pytest.approx(rate)


def test_where_it_breaks_even():
    assert break_even([1.0, 0.5, 0.25], [2.0, 1.2, 0.4]) == pytest.approx(0.25 + 0.25 * 0.75)
    assert break_even([1.0, 0.5], [0.9, 0.4]) == 1.0
    assert break_even([1.0, 0.5], [2.0, 1.5]) is None
