"""The TPU kernels: the table of blocks against the dense mask, values and gradients in interpret
mode against the reference in float64, and that they lower and compile for TPUs."""

import functools
import importlib.util

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import MODELS, relative, rows_of, shapes, step
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import ALiBi, Consecutive, alibi_slopes, attention, blocks, tpu
from kernels.attention.dropout import drawn
from kernels.attention.rule import allowed
from kernels.platform import compiling_for

SMALL = tpu.Sizes(128, 128, 128, 128)
PAIRS = tpu.Sizes(256, 256, 128, 128)  # two chunks a block


# ---------------------------------------------------------------------------------- the table


def read(table):
    """(query block, key block, kind, first, last) of each word of a row."""
    kind = (table >> blocks.KIND) & 3
    j = (table >> blocks.KEYS) & (blocks.MOST_BLOCKS - 1)
    return table >> blocks.QUERIES, j, kind, table & 1, (table >> blocks.LAST) & 1


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.sampled_from([(16, 16), (13, 13), (9, 16), (16, 7)]),
    block=st.sampled_from([(4, 4), (4, 8), (8, 4)]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 4, 7]),
    marks=st.sampled_from(["", "segments", "prefix", "both", "shuffled", "positions"]),
)
def test_table_leaves_what_the_rule_leaves(seed, lengths, block, causal, window, marks):
    rng = np.random.default_rng(seed)
    (queries, keys), batch = lengths, 2
    segments = kv_segments = prefix = None
    if marks in ("segments", "both"):
        segments, kv_segments = (rows_of(rng, batch, n, 3, 2) for n in lengths)
    if marks == "shuffled":
        segments, kv_segments = (rng.integers(0, 3, (batch, n)) for n in lengths)
    if marks in ("prefix", "both") and causal:
        prefix = (np.arange(keys) < rng.integers(0, keys, (batch, 1))).astype(np.int32)
    positions = kv_positions = None
    if marks == "positions":
        positions, kv_positions = (np.sort(rng.integers(0, 20, (batch, n))) for n in lengths)
    rule = blocks.Rule(
        queries, keys, *block, causal=causal, window=window,
        segments=segments is not None, prefix=prefix is not None, positions=positions is not None,
    )  # fmt: skip
    padded = [
        None if x is None else np.pad(x, ((0, 0), (0, to - x.shape[1])))
        for x, to in (
            (segments, rule.padded_queries),
            (kv_segments, rule.padded_keys),
            (prefix, rule.padded_keys),
        )
    ]
    if positions is not None:
        padded += [
            np.pad(x, ((0, 0), (0, to - x.shape[1])), mode="edge")
            for x, to in ((positions, rule.padded_queries), (kv_positions, rule.padded_keys))
        ]
    table = np.asarray(blocks.table(rule, *padded))
    dense = allowed(
        queries, keys, causal=causal, window=window, prefix=prefix, segments=segments,
        kv_segments=kv_segments, positions=positions, kv_positions=kv_positions,
    )  # fmt: skip
    dense = np.ones((1, queries, keys), bool) if dense is None else np.asarray(dense)
    dense = np.pad(dense, ((0, 0), (0, 0), (0, rule.padded_keys - keys)))
    for row, mask in zip(
        table, np.broadcast_to(dense, (len(table), *dense.shape[1:])), strict=True
    ):
        i, j, kind, first, last = read(row)
        left = mask.copy()
        for a, b, c in zip(i, j, kind, strict=True):
            piece = (slice(a * block[0], (a + 1) * block[0]), slice(b * block[1], None))
            part = mask[piece][:, : block[1]]
            if c != blocks.EMPTY:
                left[piece][:, : block[1]] = False
            if c == blocks.FULL:
                assert part.all()
            if c == blocks.DIAGONAL:
                assert a * block[0] == b * block[1]
                assert not np.triu(part, 1).any()
        assert not left.any(), "a pair that something is left of is not visited"
        # Each query block begins once and ends once, in order, with nothing else in between.
        np.testing.assert_array_equal(i[first == 1], np.arange(rule.query_blocks))
        np.testing.assert_array_equal(i[last == 1], np.arange(rule.query_blocks))
        assert np.all(np.diff(i) >= 0)
        visits = list(zip(i[kind > 0], j[kind > 0], strict=True))
        assert len(set(visits)) == len(visits)


def test_cost_follows_the_mask():
    def visited(table):
        return ((np.asarray(table) >> blocks.KIND) & 3 != blocks.EMPTY).sum()

    n, size = 16, 128
    make = functools.partial(blocks.Rule, n * size, n * size, size, size)
    assert visited(blocks.table(make())) == n * n
    assert visited(blocks.table(make(causal=True))) == n * (n + 1) // 2
    assert visited(blocks.table(make(causal=True, window=2 * size))) == 3 * n - 3
    documents = (1, 1, 2, 4, 8)
    segments = np.repeat(np.arange(5) + 1, np.array(documents) * size)[None]
    table = blocks.table(make(segments=True), segments, segments)
    assert visited(table) == sum(d * d for d in documents)
    table = blocks.table(make(causal=True, segments=True), segments, segments)
    assert visited(table) == sum(d * (d + 1) // 2 for d in documents)
    # On a device, where rows of the batch must have one length, words that do nothing follow.
    on_device = np.asarray(
        blocks.table(make(causal=True, segments=True), *[jnp.asarray(segments)] * 2)
    )
    np.testing.assert_array_equal(on_device[:, : table.shape[1]], table)
    assert visited(on_device[:, table.shape[1] :]) == 0


# ------------------------------------------------------------------- values and gradients


def on_tpu(q, k, v, bias, marks, sizes=SMALL, **static):
    marks = {"kv_segments": marks.get("segments"), **marks}
    scale = q.shape[-1] ** -0.5
    return tpu.attention(
        q, k, v, bias=bias, scale=scale, sizes=sizes, interpret=True, **marks, **static
    )


compare = functools.partial(attention_cases.compare, on_tpu)


@pytest.mark.parametrize("length", [1, 127, 129])
def test_lengths_about_a_block(length):
    compare((1, length, 2, 32), groups=1, causal=True)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_packed_rows_with_prefixes(seed):
    rng = np.random.default_rng(seed)
    segments = rows_of(rng, 2, 300, padding=int(rng.integers(1, 150)))
    prefix = (rng.integers(0, 3, (2, 300)) == 0).astype(np.int32)
    prefix[:, rng.integers(0, 300) :] = 0
    marks = {"segments": jnp.asarray(segments), "prefix": jnp.asarray(prefix)}
    compare((2, 300, 4, 16), marks, groups=2, causal=True, seed=seed)


def test_t5_bias_in_chunks_of_a_block():
    bias = relative(2, bidirectional=False)
    compare((2, 500, 2, 64), bias=bias, groups=1, causal=True, sizes=PAIRS)


def test_t5_bias_both_ways_between_segments():
    segments = rows_of(np.random.default_rng(0), 2, 300)
    bias = relative(2, bidirectional=True, max_distance=40)
    marks = {"segments": jnp.asarray(segments)}
    marks["dropout"] = drawn(0.3, jax.random.key(0), 2, 2, 300, 300)
    compare((2, 300, 2, 16), marks, bias, softcap=3.0, dtype="bfloat16")


def test_alibi_and_other_lengths_of_keys():
    bias = ALiBi(jnp.asarray(alibi_slopes(2)))
    compare((1, 140, 2, 16), bias=bias, keys=400, wide=32)


def test_window_and_keys_that_run_out_and_dropout():
    marks = {"dropout": drawn(0.5, jax.random.key(0), 1, 2, 390, 200)}
    compare((1, 390, 2, 16), marks, keys=200, groups=1, causal=True, window=100)


def test_positions_say_where_rows_stand():
    """Rows cut out of longer ones, as where the length is cut over devices; and any."""
    rng = np.random.default_rng(0)
    marks = {"positions": jnp.asarray(100 + np.arange(150))}
    compare((1, 150, 1, 16), marks, keys=260, causal=True)
    marks = {"kv_positions": jnp.asarray(np.sort(rng.integers(0, 200, (2, 260))))}
    marks["positions"] = jnp.asarray(rng.integers(0, 200, (2, 150)))
    segments = [jnp.asarray(rng.integers(0, 2, (2, n))) for n in (150, 260)]
    marks |= dict(zip(("segments", "kv_segments"), segments, strict=True))
    compare((2, 150, 2, 16), marks, keys=260, groups=1, causal=True, window=60)


def test_bias_between_consecutive_positions():
    """Of which the first is known when the program runs, as where the length is cut."""
    place = jnp.int32(256)
    marks = {"positions": Consecutive(place, 128), "kv_positions": Consecutive(place - 128, 128)}
    bias = relative(2, bidirectional=True, max_distance=200)
    compare((1, 130, 2, 16), marks, bias, keys=300, groups=1)


def test_positions_skip_what_comes_after():
    """A quarter of the queries, at the end: of four blocks of keys all, at the start: one."""
    rule = blocks.Rule(128, 512, 128, 128, causal=True, positions=True)
    for first, visited in ((384, 4), (0, 1)):
        table = blocks.table(
            rule, positions=first + np.arange(128)[None], kv_positions=np.arange(512)[None]
        )
        assert (read(table[0])[2] != blocks.EMPTY).sum() == visited


def test_under_transformations():
    attention_cases.check_transformations(on_tpu, 150)


def test_second_derivative():
    attention_cases.check_second_derivative(on_tpu)


def races_found() -> bool:
    """What the interpreter says of its last run; no public name does."""
    from jax._src.pallas.mosaic import interpret

    module = interpret if hasattr(interpret, "races") else interpret.interpret_pallas_call
    return module.races.races_found


def test_no_races():
    interpret = pltpu.InterpretParams(detect_races=True)
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 200, 2, 16)), jnp.float32)

    def total(q, interpret):
        out = tpu.attention(q, q, q, causal=True, scale=0.2, sizes=SMALL, interpret=interpret)
        return (out**2).sum()

    got = jax.jit(jax.grad(lambda q: total(q, interpret)))(q)
    want = jax.jit(jax.grad(lambda q: total(q, True)))(q)
    np.testing.assert_array_equal(got, want)
    assert not races_found()


# ------------------------------------------------------------------------------ for the chip


@pytest.mark.parametrize(("model", "length"), [("t5 base", 512), ("llama 1b", 2048)])
def test_lowers_for_tpus_without_one(model, length):
    bias, arguments = shapes(model, length)
    text = (
        jax.jit(step(bias, "pallas_tpu"))
        .trace(*arguments)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    assert text.count("tpu_custom_call") == 2


TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: tpu)"
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "model", "length"),
    [
        (TARGETS[(i + j) % len(TARGETS)], model, length)
        for i, model in enumerate(MODELS)
        for j, length in enumerate((512, 2048, 8192))
    ],
)
def test_compiles_for_tpus(target, model, length, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    bias, arguments = shapes(model, length, 1, SingleDeviceSharding(topology.devices[0]))
    with compiling_for(topology.devices[0]):
        traced = jax.jit(step(bias, "pallas_tpu")).trace(*arguments)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 2
    attention_cases.assert_linear(compiled, model, length)


# ----------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": jnp.arange(4), "bias": ALiBi(jnp.ones(2))}, "positions"),
        ({"bias": jnp.zeros((2, 4, 4))}, "bias"),
    ],
)
def test_refuses_what_it_cannot_serve(change, message):
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(NotImplementedError, match=message):
        attention(q, q, q, implementation="pallas_tpu", **change)
    with pytest.raises(NotImplementedError, match="dtype"):
        attention(*[q.astype(jnp.float16)] * 3, implementation="pallas_tpu")
