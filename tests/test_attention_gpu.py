"""The GPU kernels: values and gradients in interpret mode against the reference in float64, and
that they lower and compile for GPUs."""

import functools
import importlib.util

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import relative, rows_of, shapes, step
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import (
    ALiBi,
    RelativeBias,
    alibi_slopes,
    attention,
    blocks,
    gpu,
    gpu_cost,
    gpu_parts,
)
from kernels.attention.cases import Case
from kernels.attention.dropout import drawn
from kernels.attention.gpu_parts import Plan, Size
from kernels.attention.rule import allowed

SMALL = gpu.Sizes(Size(32, 16), Size(16, 32), Size(32, 32), Size(16, 16))


def on_gpu(q, k, v, bias, marks, sizes=SMALL, **static):
    marks = {"kv_segments": marks.get("segments"), "positions": None, "kv_positions": None, **marks}
    scale = q.shape[-1] ** -0.5
    return gpu.attention(
        q, k, v, bias=bias, scale=scale, sizes=sizes, interpret=True, **marks, **static
    )


compare = functools.partial(attention_cases.compare, on_gpu)


# ---------------------------------------------------------------------------------- the tables


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.sampled_from([(48, 48), (45, 45), (20, 60), (60, 20)]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 9, 30]),
    marks=st.sampled_from(["", "segments", "prefix", "both", "shuffled", "positions"]),
    reach=st.sampled_from([0, 1, 12, 70]),
)
def test_tables_leave_what_the_rule_leaves(seed, lengths, causal, window, marks, reach):
    rng = np.random.default_rng(seed)
    (queries, keys), batch = lengths, 2
    size, given = Size(16, 32), {}
    if marks in ("segments", "both"):
        given["segments"], given["kv_segments"] = (rows_of(rng, batch, n, 3, 2) for n in lengths)
    if marks == "shuffled":
        given["segments"], given["kv_segments"] = (rng.integers(0, 3, (batch, n)) for n in lengths)
    if marks in ("prefix", "both") and causal:
        given["prefix"] = (np.arange(keys) < rng.integers(0, keys, (batch, 1))).astype(np.int32)
    if marks == "positions":
        given["positions"], given["kv_positions"] = (
            rng.permutation(100)[:n][None].astype(np.int32) for n in lengths
        )
    rule = blocks.Rule(
        queries, keys, size.queries, size.keys, causal=causal, window=window,
        segments="segments" in given, prefix="prefix" in given, positions="positions" in given,
    )  # fmt: skip
    plan = Plan(rule, size, 1.0, reach=reach)
    padded = {}
    for name, x in given.items():
        length = rule.padded_keys if name[:2] in ("kv", "pr") else rule.padded_queries
        mode = "edge" if "positions" in name else "constant"
        padded[name] = np.pad(x, ((0, 0), (0, length - x.shape[1])), mode=mode)
    order, counts = (np.asarray(x) for x in gpu_parts.tables(plan, padded))
    by_key = [np.asarray(x) for x in gpu_parts.tables(plan, padded, by_key=True)]
    dense = allowed(queries, keys, causal=causal, window=window, **given)
    dense = np.ones((1, queries, keys), bool) if dense is None else np.asarray(dense)
    dense = np.pad(dense, ((0, 0), (0, 0), (0, rule.padded_keys - keys)))
    for b in range(max(len(order), len(dense))):
        mask, row = dense[b % len(dense)], b % len(order)
        visits = set()
        for i in range(rule.query_blocks):
            for n, j in enumerate(order[row, i, : counts[row, i, 2]]):
                piece = mask[i * 16 : i * 16 + 16, j * 32 : j * 32 + 32]
                masked, near = n >= counts[row, i, 1], n >= counts[row, i, 0]
                assert piece.any() or masked
                assert masked or piece.all()
                assert masked or near or not reach or _is_far(i, j, reach, lengths)
                mask[i * 16 : i * 16 + 16, j * 32 : j * 32 + 32] = False
                visits.add((i, j))
        assert not mask.any(), "a block that something is left of is not visited"
        order_t, counts_t = (x[row] for x in by_key)
        assert visits == {(i, j) for j in range(len(order_t)) for i in order_t[j, : counts_t[j, 2]]}


def _is_far(i, j, reach, lengths):
    queries, keys = np.arange(i * 16, i * 16 + 16), np.arange(j * 32, j * 32 + 32)
    ahead = keys[keys < lengths[1]][None] - queries[queries < lengths[0]][:, None]
    return (ahead >= reach).all() or (ahead <= -reach).all()


def test_cost_follows_the_mask():
    def visited(segments=None, **rule):
        rule = blocks.Rule(512, 512, 32, 32, segments=segments is not None, **rule)
        marks = {} if segments is None else {"segments": segments, "kv_segments": segments}
        _, counts = gpu_parts.tables(Plan(rule, Size(32, 32), 1.0), marks)
        return int(counts[..., 2].sum())

    assert visited() == 16 * 16
    assert visited(causal=True) == 16 * 17 // 2
    assert visited(causal=True, window=64) == 3 * 16 - 3
    documents = (1, 1, 2, 4, 8)
    segments = np.repeat(np.arange(5) + 1, np.array(documents) * 32)[None]
    assert visited(segments) == sum(d * d for d in documents)
    assert visited(segments, causal=True) == sum(d * (d + 1) // 2 for d in documents)


def test_costs_are_of_the_blocks_visited():
    def total(**changes):
        found = gpu_cost.costs(Case(length=4096, **changes))
        return {cost.name: cost for cost in found}

    full, half = total(causal=False)["forward"], total()["forward"]
    assert full.flops == Case(length=4096, causal=False).flops()
    blocks = 4096 // 128, 4096 // 64
    assert half.blocks == 4 * 16 * (blocks[0] * (blocks[0] + 1))  # two of keys a block of queries
    assert half.flops > Case(length=4096).flops()
    assert total(documents=4)["forward"].blocks < half.blocks / 3
    with_bias = total(backward=True, bias="t5")
    assert set(with_bias) == {"forward", "keys", "queries", "bias"}
    # The bias's kernel grows with the length, the others with its square.
    longer = {c.name: c for c in gpu_cost.costs(Case(length=8192, backward=True, bias="t5"))}
    assert longer["bias"].flops == 2 * with_bias["bias"].flops
    assert longer["keys"].flops > 3.8 * with_bias["keys"].flops
    text = gpu_cost.report(Case(backward=True), gpu_cost.CHIPS["h100"])
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["forward", "keys", "queries"]


# ------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("length", [1, 129])
def test_lengths_about_a_block(length):
    compare((1, length, 2, 32), groups=1, causal=True)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_packed_rows_with_prefixes(seed):
    rng = np.random.default_rng(seed)
    segments = rows_of(rng, 2, 100, padding=int(rng.integers(1, 50)))
    prefix = (rng.integers(0, 3, (2, 100)) == 0).astype(np.int32)
    prefix[:, rng.integers(0, 100) :] = 0
    marks = {"segments": jnp.asarray(segments), "prefix": jnp.asarray(prefix)}
    bias = relative(4, bidirectional=True, max_distance=20)
    compare((2, 100, 4, 16), marks, bias, groups=2, causal=True, seed=seed)


def test_t5_bias():
    bias = relative(2, bidirectional=False, max_distance=60, buckets=16)
    compare((2, 200, 2, 16), bias=bias, groups=1, causal=True)


def test_t5_bias_both_ways_between_segments():
    segments = rows_of(np.random.default_rng(0), 2, 128)
    bias = relative(2, bidirectional=True, max_distance=40)
    marks = {"segments": jnp.asarray(segments)}
    marks["dropout"] = drawn(0.3, jax.random.key(0), 2, 2, 128, 128)
    compare((2, 128, 2, 16), marks, bias, softcap=3.0, dtype="bfloat16")


def test_t5_bias_and_other_lengths_of_keys():
    compare((1, 20, 2, 16), bias=relative(2, True, 30), keys=127, wide=32)


def test_alibi_odd_widths_and_keys_that_run_out():
    bias = ALiBi(jnp.asarray(alibi_slopes(2)))
    marks = {"dropout": drawn(0.5, jax.random.key(0), 1, 2, 130, 70)}
    compare((1, 130, 2, 80), marks, bias, keys=70, groups=1, wide=24, causal=True, window=50)


def test_positions_in_any_order():
    rng = np.random.default_rng(0)
    marks = {
        "positions": jnp.asarray([3 * rng.permutation(80) for _ in range(2)]),
        "kv_positions": jnp.asarray(rng.permutation(80)),
    }
    bias = relative(2, True, 50, buckets=6)
    compare((2, 80, 2, 16), marks, bias, groups=1, causal=True, window=60, softcap=4.0)


def test_under_transformations():
    attention_cases.check_transformations(on_gpu, 70)


def test_second_derivative():
    attention_cases.check_second_derivative(on_gpu)


# ------------------------------------------------------------------------------ for the chip


@pytest.mark.parametrize(
    ("model", "length", "kernels"), [("t5 base", 512, 4), ("llama 1b", 2048, 3)]
)
def test_lowers_for_gpus_without_one(model, length, kernels):
    bias, arguments = shapes(model, length)
    traced = jax.jit(step(bias, "pallas_gpu")).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == kernels


@pytest.mark.parametrize(
    ("bias", "given"),
    [
        (relative(4, True), {"causal": True, "prefix": True, "softcap": 3.0}),
        (relative(4, True), {"positions": True, "causal": True, "window": 40}),
        (relative(4, True), {}),
        (ALiBi(jnp.ones(4)), {"segments": True, "causal": True, "dropout": 0.1}),
        (None, {"window": 30, "positions": True}),
    ],
)
def test_every_argument_lowers(bias, given):
    shape = jax.ShapeDtypeStruct((2, 300, 4, 32), jnp.float32)
    rows = jax.ShapeDtypeStruct((2, 300), jnp.int32)
    marks = {name: rows for name in ("prefix", "segments", "positions") if name in given}
    static = {name: x for name, x in given.items() if name not in marks}

    def total(q, k, bias, marks):
        if "dropout" in static:
            marks["dropout"] = (static["dropout"], jax.random.key(0))
        options = {name: x for name, x in static.items() if name != "dropout"}
        out = attention(q, k, k, bias=bias, implementation="pallas_gpu", **marks, **options)
        return out.sum()

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(shape, shape, bias, marks)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    by_diagonals = isinstance(bias, RelativeBias) and "positions" not in given
    assert text.count("xla.gpu.triton") == 3 + by_diagonals


# A description of the chip, so that programs compile where there is none.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 patch: 1 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="the CUDA plugin is not installed (extra: cuda12)",
)


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "length"),
    [("t5 base", 512), ("t5 xxl", 2048), ("llama 1b", 8192), ("llama 7b", 8192)],
)
def test_compiles_for_gpus(model, length):
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1"
    )
    bias, arguments = shapes(model, length, 1, SingleDeviceSharding(topology.devices[0]))
    traced = jax.jit(step(bias, "pallas_gpu")).trace(*arguments)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    attention_cases.assert_linear(compiled, model, length)


# ----------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": jnp.zeros((2, 4, 4))}, "bias .an array"),
    ],
)
def test_refuses_what_it_cannot_serve(change, message):
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(NotImplementedError, match=message):
        attention(q, q, q, implementation="pallas_gpu", **change)
    with pytest.raises(NotImplementedError, match="dtype"):
        attention(*[q.astype(jnp.float16)] * 3, implementation="pallas_gpu")
