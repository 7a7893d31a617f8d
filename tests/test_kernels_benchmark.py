"""The benchmark command, its clock, and the peers that attention is held against."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import benchmark, timing
from kernels.attention import attention, peers
from kernels.attention.cases import Case, ours, random_argument


def test_functions_take_turns(monkeypatch):
    """Of two functions the slow one is slow, each round times both, and the order turns."""
    order = []

    def wait(name, seconds):
        order.append(name)
        time.sleep(seconds)
        return np.zeros(1)

    functions = {
        "slow": functools.partial(wait, "slow", 0.004),
        "quick": functools.partial(wait, "quick", 0.001),
    }
    times = timing.interleaved(functions, rounds=3, round_seconds=0)
    assert times["slow"].seconds > 0.004 > times["quick"].seconds > 0.001
    assert times["slow"].low <= times["slow"].seconds <= times["slow"].high
    assert order[4:] == ["slow", "quick", "quick", "slow", "slow", "quick"]
    # Short calls are repeated within a round; what is reported stays the time of one.
    many = timing.interleaved(functions, rounds=1, round_seconds=0.04, most_calls=5)
    assert many["quick"].calls == 5
    assert 0.001 < many["quick"].seconds < 0.004
    with pytest.raises(ValueError, match="nothing"):
        timing.interleaved({}, rounds=1)


def test_rate_of_a_matrix_product(monkeypatch):
    monkeypatch.setattr(
        timing, "interleaved", lambda functions, **_: {"product": timing.Timing(2.0, 0, 0, 1)}
    )
    assert timing.matmul_rate(jnp.float32, 16) == 2 * 16**3 / 2.0


def test_table():
    rows = [{"by": "a", "ms": 0.12345, "MiB": 12345.6}, {"by": "bcd", "n": 1200, "ms": None}]
    assert benchmark.table(rows).splitlines() == [
        "| by  |    ms |    MiB |     n |",
        "| --- | ----: | -----: | ----: |",
        "| a   | 0.123 | 12,346 |     - |",
        "| bcd |     - |      - | 1,200 |",
    ]


def test_attention_benchmark(capsys):
    options = ["attention", "--lengths", "16", "--rounds", "1", "--width", "8", "--bias", "t5"]
    benchmark.main([*options, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["command"] == "python -m kernels.benchmark " + " ".join([*options, "--json"])
    assert record["versions"]["jax"] == jax.__version__
    product, *rows = record["rows"]
    assert {row["by"] for row in rows} == {"plain XLA", "ours: xla"}
    assert [row["direction"] for row in rows] == ["forward"] * 2 + ["forward + backward"] * 2
    for row in rows:
        flops = Case(1, 2, length=16, width=8, backward="backward" in row["direction"]).flops()
        np.testing.assert_allclose(row["TFLOP/s"] * row["ms"], flops / 1e9)
        np.testing.assert_allclose(row["of matmul"], row["TFLOP/s"] / product["TFLOP/s"])
    benchmark.main([*options, "--only", "ours: xla"])
    assert "plain XLA" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "case",
    [
        Case(length=12),
        Case(length=12, causal=False),
        Case(length=12, window=5),
        Case(length=12, documents=3),
        Case(length=12, causal=False, window=3),
        Case(length=12, documents=2, window=4, causal=False),
    ],
)
def test_work_is_that_of_the_pairs_seen(case):
    q = jnp.zeros((1, 12, 1, 12))
    seen = attention(  # a value for each key: what is not zero was seen
        q, q, jnp.eye(12)[None, :, None], causal=case.causal, window=case.window,
        segments=None if case.segments() is None else case.segments()[:1],
    )  # fmt: skip
    pairs = int((np.asarray(seen) > 0).sum())
    assert case.pairs() == pairs
    assert case.flops() == 4 * 16 * pairs * (2 * 128) * 2


@pytest.mark.parametrize(
    "change",
    [{}, {"causal": False, "bias": "t5"}, {"window": 3, "bias": "alibi"}, {"documents": 3}],
)
def test_plain_xla_computes_the_same(change):
    case = Case(2, 2, length=12, width=8, dtype="float32", backward=True, **change)
    arguments = case.arguments(random_argument())
    xla = functools.partial(peers.dot_product_attention, "xla")
    got, want = (jax.jit(case.function(f))(*arguments) for f in (xla, ours("reference")))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("bias", [None, "t5"])
def test_jaxs_tpu_kernels_are_asked_for_the_same(bias):
    """They do not run here; their programs for TPUs have a kernel each and our shapes."""
    case = Case(1, 2, length=256, backward=True, bias=bias)
    arguments = case.arguments(jax.ShapeDtypeStruct)
    flash = jax.jit(case.function(peers.jax_flash)).trace(*arguments)
    assert flash.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3
    splash = jax.jit(case.function(peers.jax_splash))
    if bias is None:
        text = splash.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == 2
    else:
        with pytest.raises(NotImplementedError, match="bias=t5"):
            splash.trace(*arguments)
