"""The attention op: against a loop in numpy, T5's and ALiBi's formulas, and its own reference."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from kernels.attention import (
    ALiBi,
    RelativeBias,
    Split,
    alibi_slopes,
    api,
    attention,
    cudnn,
    materialize,
    sharded_attention,
    shared_bias,
    xla,
)
from kernels.attention import dropout as dropouts

IMPLEMENTATIONS = ("reference", "xla")


# One program a call: operation by operation, most of a test's time would go into compiling.
compiled = jax.jit(
    attention, static_argnames=("causal", "window", "softcap", "scale", "implementation")
)


def brute_force(q, k, v, see, bias=None, scale=None):
    """A loop in float64. ``see(b, t, s)`` says whether query t sees key s."""
    (batch, queries, heads, width), groups = q.shape, k.shape[2]
    out = np.zeros((batch, queries, heads, v.shape[-1]))
    for b in range(batch):
        for n in range(heads):
            for t in range(queries):
                keys = [s for s in range(k.shape[1]) if see(b, t, s)]
                if not keys:
                    continue
                g = n // (heads // groups)
                scores = np.array([q[b, t, n] @ k[b, s, g] for s in keys], np.float64)
                scores *= width**-0.5 if scale is None else scale
                if bias is not None:
                    scores += [bias[n, t, s] for s in keys]
                p = np.exp(scores - scores.max())
                out[b, t, n] = (p / p.sum()) @ np.array([v[b, s, g] for s in keys], np.float64)
    return out


def arrays(shape=(2, 7, 4, 8), keys=None, groups=2, value_width=None, seed=0):
    rng = np.random.default_rng(seed)
    batch, queries, _, width = shape
    keys = queries if keys is None else keys
    q = rng.normal(size=shape)
    k = rng.normal(size=(batch, keys, groups, width))
    v = rng.normal(size=(batch, keys, groups, value_width or width))
    return [x.astype(np.float32) for x in (q, k, v)]


LENGTH = 9  # one length, so that every example runs the same compiled program
rows = st.tuples(
    *[st.lists(st.integers(0, high), min_size=LENGTH, max_size=LENGTH) for high in (3, 3, 1, 1)]
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(rows=rows, causal=st.booleans(), window=st.sampled_from([None, 1, 4]))
def test_rule_against_brute_force(implementation, rows, causal, window):
    segments, prefix = np.array(rows[:2], np.int32), np.array(rows[2:], np.int32)
    q, k, v = arrays((2, LENGTH, 2, 4), groups=1)

    def see(b, t, s):
        same = segments[b, t] == segments[b, s] != 0
        ordered = not causal or s <= t or prefix[b, s] == 1
        return same and ordered and (window is None or abs(t - s) < window)

    got = compiled(
        q,
        k,
        v,
        causal=causal,
        prefix=prefix if causal else None,
        segments=segments,
        window=window,
        implementation=implementation,
    )
    np.testing.assert_allclose(got, brute_force(q, k, v, see), atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cross_attention_and_width_of_values(implementation):
    q, k, v = arrays((2, 5, 4, 8), keys=9, groups=1, value_width=6)
    segments = np.array([[1, 1, 2, 2, 0], [1, 2, 2, 3, 3]], np.int32)
    kv_segments = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 2 + [2] * 7], np.int32)
    got = compiled(q, k, v, segments=segments, kv_segments=kv_segments, scale=0.5,
                    implementation=implementation)  # fmt: skip
    want = brute_force(q, k, v, lambda b, t, s: segments[b, t] == kv_segments[b, s] != 0, scale=0.5)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert not np.any(got[1, 3:]), "segment 3 has no keys: its queries get zeros"
    assert not np.any(got[0, 4]), "padding gets zeros"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_positions_say_where_rows_stand(implementation):
    q, k, v = arrays((1, 9, 4, 8))
    slopes = jnp.asarray(alibi_slopes(4))
    for bias in (ALiBi(slopes), RelativeBias(jax.random.normal(jax.random.key(0), (4, 8)), 16)):
        arguments = {"causal": True, "window": 4, "bias": bias, "implementation": implementation}
        whole = compiled(q, k, v, **arguments)
        part = compiled(q[:, 5:7], k, v, positions=jnp.array([5, 6]), **arguments)
        np.testing.assert_allclose(part, whole[:, 5:7], atol=1e-5)


def t5_bucket(distance, bidirectional, buckets, max_distance):
    """One bucket, by Python's arithmetic, from the rule in T5's paper and code."""
    bucket = 0
    if bidirectional:
        buckets //= 2
        bucket = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = -min(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return bucket + distance
    ratio = np.log(np.float32(distance) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    return bucket + min(exact + int(ratio * np.float32(buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (64, 512)])
def test_buckets_are_t5s(bidirectional, buckets, max_distance):
    distances = np.arange(-600, 601)
    bias = RelativeBias(jnp.zeros((2, buckets)), max_distance, bidirectional)
    want = [t5_bucket(int(d), bidirectional, buckets, max_distance) for d in distances]
    np.testing.assert_array_equal(bias.buckets(jnp.asarray(distances)), want)
    assert max(want) == buckets - 1 if bidirectional else min(want) == 0


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (4, 9), (9, 4)])
def test_materialize(queries, keys):
    table = jax.random.normal(jax.random.key(0), (3, 16))
    distance = np.arange(keys)[None] - np.arange(queries)[:, None]
    weights = jax.random.normal(jax.random.key(1), (3, queries, keys))

    def spread(table):
        return materialize(RelativeBias(table, 12), queries, keys)

    def looked_up(table):
        return table[:, RelativeBias(table, 12).buckets(distance)]

    np.testing.assert_array_equal(spread(table), looked_up(table))
    got, want = (
        jax.grad(lambda x, f=f: (f(x) * weights).sum())(table) for f in (spread, looked_up)
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_alibi_slopes_and_bias():
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    # 12 heads: those of 8, then every other one of 16 (ratio 2^-0.5).
    assert alibi_slopes(12)[8:] == tuple(2 ** (-0.5 * i) for i in (1, 3, 5, 7))
    bias = materialize(ALiBi(jnp.asarray(alibi_slopes(2))), 3, 4)
    want = [
        [[-slope * abs(t - s) for s in range(4)] for t in range(3)] for slope in (1 / 16, 1 / 256)
    ]
    np.testing.assert_allclose(bias, want)


def test_a_shared_bias_is_the_same_bias():
    q, k, v = arrays((2, 6, 4, 8))
    bias = RelativeBias(jax.random.normal(jax.random.key(0), (4, 8)), 10)

    def run(share):
        def total(bias):
            given = shared_bias(bias, 6, 6) if share else bias
            out = attention(q, k, v, bias=given)
            return (attention(out, k, v, bias=given) ** 2).sum()

        return jax.jit(jax.value_and_grad(total))(bias)

    (got, d_got), (want, d_want) = run(True), run(False)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(d_got.table, d_want.table, atol=1e-5)
    assert shared_bias(None, 6, 6) is None


CASES = {
    "full": {},
    "causal": {"causal": True},
    "packed": {"causal": True, "segments": True, "prefix": True},
    "window": {"causal": True, "window": 3},
    "relative": {"causal": True, "segments": True, "bias": "relative"},
    "alibi": {"causal": True, "bias": "alibi"},
    "array": {"bias": "array"},
    "array over heads": {"bias": "heads"},
    "softcap": {"softcap": 2.0, "causal": True, "segments": True},
    "softcap and bias": {"softcap": 1.5, "bias": "array"},
    "dropout": {"causal": True, "segments": True, "dropout": (0.3, 5)},
}


def arguments_of(case, batch, length, heads):
    rng = np.random.default_rng(1)
    arguments = dict(case)
    bias = arguments.pop("bias", None)
    if arguments.pop("segments", False):
        segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
        segments[:, -2:] = 0
        arguments["segments"] = jnp.asarray(segments)
    if arguments.pop("prefix", False):
        arguments["prefix"] = jnp.asarray(rng.integers(0, 2, (batch, length)))
    if "dropout" in arguments:
        rate, seed = arguments["dropout"]
        arguments["dropout"] = (rate, jax.random.key(seed))
    biases = {
        "relative": RelativeBias(jnp.asarray(rng.normal(size=(heads, 8)), jnp.float32), 6, False),
        "alibi": ALiBi(jnp.asarray(alibi_slopes(heads))),
        "array": jnp.asarray(rng.normal(size=(batch, heads, length, length)), jnp.float32),
        "heads": jnp.asarray(rng.normal(size=(1, length, length)), jnp.float32),
    }
    return arguments, biases.get(bias)


@pytest.mark.parametrize(
    ("case", "groups"),
    [*[(case, 2) for case in CASES], ("packed", 4), ("packed", 1), ("relative", 1)],
)
def test_values_and_gradients_equal_the_reference(case, groups):
    q, k, v = arrays((2, 10, 4, 8), groups=groups)
    arguments, bias = arguments_of(CASES[case], 2, 10, 4)
    weights = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)

    def run(implementation):
        def total(q, k, v, bias):
            out = attention(q, k, v, bias=bias, **arguments, implementation=implementation)
            return (out * weights).sum(), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, bias)

    (_, got), got_grads = run("xla")
    (_, want), want_grads = run("reference")
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_what_cudnn_is_asked_for(window):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays((2, 10, 4, 8)))
    names = ("prefix", "segments", "positions", "kv_positions", "bias", "softcap", "dropout")
    given = {"causal": True, "window": window, **dict.fromkeys(names)}
    got = cudnn.attention(q, k, v, scale=0.3, backend="xla", **given)
    want = attention(q, k, v, scale=0.3, causal=True, window=window, implementation="reference")
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (got, want)), atol=2**-6)


@pytest.mark.parametrize("name", ["segments", "prefix", "positions", "bias", "softcap", "window"])
def test_cudnn_refuses(name):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays((2, 10, 4, 8)))
    marks = jnp.ones((2, 10), jnp.int32)
    value = {"positions": marks, "bias": ALiBi(jnp.ones(4)), "softcap": 2.0, "window": 3}
    change = {name: value.get(name, marks), "causal": name == "prefix"}
    with pytest.raises(NotImplementedError, match=name):
        attention(q, k, v, implementation="cudnn", **change)


@pytest.mark.parametrize(
    ("backend", "change", "choice"),
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "pallas_tpu"),
        ("tpu", {"dropout": (0.1, jax.random.key(0))}, "pallas_tpu"),
        ("tpu", {"bias": np.zeros((1, 2, 1, 128), np.float32)}, "xla"),
        ("tpu", {"segments": np.ones((1, 128), int)}, "pallas_tpu"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"segments": np.ones((1, 128), int)}, "pallas_gpu"),
        ("gpu", {"bias": RelativeBias(np.zeros((2, 8), np.float32))}, "pallas_gpu"),
        ("gpu", {"dropout": (0.1, jax.random.key(0))}, "pallas_gpu"),
        ("gpu", {"softcap": 2.0, "bias": np.zeros((1, 2, 1, 128), np.float32)}, "xla"),
    ],
)
def test_choice(backend, change, choice, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setitem(api.IMPLEMENTATIONS, choice, lambda *_, **__: choice)
    q = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    assert attention(q, q, q, causal=True, **change) == choice
    if choice.startswith("pallas"):  # one query at a time
        monkeypatch.setitem(api.IMPLEMENTATIONS, "xla", lambda *_, **__: "xla")
        assert attention(q[:, :1], q, q, softcap=2.0) == "xla"


def test_kernel_is_chosen_inside_a_mesh_only(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    chosen = []
    for name in ("xla", "pallas_tpu"):
        monkeypatch.setitem(
            api.IMPLEMENTATIONS, name, lambda q, *_, name=name, **__: chosen.append(name) or q
        )
    q = jnp.zeros((8, 128, 2, 8))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    jax.eval_shape(lambda q: attention(q, q, q), q)
    jax.eval_shape(lambda q: sharded_attention(q, q, q, mesh=mesh, split=Split("data")), q)
    assert chosen == ["xla", "pallas_tpu"]


SPLITS = {
    "batch and heads": (Split(batch="data", heads="tensor"), "xla"),
    "batch over two axes": (Split(batch=("data", "tensor")), "xla"),
    "context": (Split(batch="data", length="tensor"), "xla"),
    "kernels": (Split(batch="data", heads="tensor"), "pallas_tpu_interpret"),
    "ring": (Split(batch="data", length="tensor", ring=True), "xla"),
    "ring by kernels": (Split(batch="data", length="tensor", ring=True), "pallas_tpu_interpret"),
}


@pytest.mark.parametrize(
    ("case", "groups"), [*((case, 4) for case in SPLITS), ("batch and heads", 1), ("ring", 1)]
)
def test_over_a_mesh_as_on_one_device(case, groups):
    split, implementation = SPLITS[case]
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    q, k, v = arrays((8, 12, 4, 8), groups=groups)
    bias = RelativeBias(jax.random.normal(jax.random.key(0), (4, 8)), 6)
    # By the kernels, a bias takes rows of whole tiles.
    bias = None if split.length and implementation != "xla" else bias
    rng = np.random.default_rng(0)
    marks = {
        "segments": np.sort(rng.integers(0, 3, (8, 12))),
        "prefix": rng.integers(0, 2, (8, 12)),
    }
    weights = rng.normal(size=q.shape).astype(np.float32)
    dropout = (0.2, jax.random.key(1))

    def run(function):
        def total(q, k, v, bias):
            out = function(q, k, v, bias=bias, causal=True, dropout=dropout, **marks)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(q, k, v, bias)

    def over_mesh(*arrays, **arguments):
        return sharded_attention(
            *arrays, mesh=mesh, split=split, implementation=implementation, **arguments
        )

    for a, b in zip(jax.tree.leaves(run(over_mesh)), jax.tree.leaves(run(attention)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("ring", [True, False])
def test_bias_of_the_kernels_where_the_length_is_cut(ring):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("length", "heads"))
    split = Split(heads="heads", length="length", ring=ring)
    q, _, _ = arrays((1, 256, 4, 8))
    bias = RelativeBias(jax.random.normal(jax.random.key(0), (4, 8)), 100, not ring)

    def run(**arguments):
        def total(q, bias):
            out = sharded_attention(
                q, q, q, mesh=mesh, bias=bias, causal=ring, window=200, **arguments
            )
            return (out**2).sum()

        return jax.tree.leaves(jax.jit(jax.grad(total, (0, 1)))(q, bias))

    got = run(split=split, implementation="pallas_tpu_interpret")
    want = run(split=Split(), implementation="reference")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_ring_keeps_its_share_of_the_keys():
    mesh = Mesh(np.array(jax.devices()), ("length",))

    def temporaries(ring, length=1 << 15):
        x = jax.ShapeDtypeStruct((1, length, 1, 256), jnp.float32)
        split = Split(length="length", ring=ring)

        def total(q, k, v):
            return sharded_attention(q, k, v, mesh=mesh, split=split, causal=True).sum()

        sharding = jax.NamedSharding(mesh, jax.P(None, "length"))
        gradients = jax.jit(jax.grad(total, (0, 1, 2)), in_shardings=(sharding,) * 3)
        return gradients.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    share = 4 * 256 * (1 << 15) // 8
    ring, gathered = temporaries(True), temporaries(False)
    assert gathered > 4 * 8 * share  # keys, values and the gradients of each
    assert ring < gathered / 2
    assert ring < 1.1 * temporaries(True, 1 << 16) / 2


def test_a_ring_says_what_it_does_not_serve():
    mesh = Mesh(np.array(jax.devices()), ("length",))
    ring = functools.partial(sharded_attention, mesh=mesh, split=Split(length="length", ring=True))
    q = jnp.zeros((1, 8, 1, 4))
    with pytest.raises(NotImplementedError, match=r"bias \(an array\)"):
        ring(q, q, q, bias=jnp.zeros((8, 8)))
    with pytest.raises(NotImplementedError, match="reference"):
        ring(q, q, q, implementation="reference")
    with pytest.raises(ValueError, match="prefix"):
        ring(q, q, q, prefix=jnp.ones((1, 8), int))
    with pytest.raises(ValueError, match="length of keys 9"):
        ring(q, *[jnp.zeros((1, 9, 1, 4))] * 2)
    with pytest.raises(NotImplementedError, match="second derivative"):
        jax.hessian(lambda q: ring(q, q, q).sum())(q)


def test_a_mesh_must_divide_the_sizes():
    q = jnp.zeros((3, 8, 4, 8))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    with pytest.raises(ValueError, match="batch 3"):
        sharded_attention(q, q, q, mesh=mesh, split=Split(batch="data"))


@pytest.fixture
def chunked(monkeypatch):
    """XLA takes four queries at a time."""
    monkeypatch.setattr(xla, "MOST_SCORES", 1)
    monkeypatch.setattr(xla, "LEAST_CHUNK", 4)
    compiled.clear_cache()
    yield
    compiled.clear_cache()


@pytest.mark.parametrize(
    "case", ["packed", "relative", "alibi", "array", "array over heads", "dropout"]
)
def test_chunks_of_queries_equal_the_reference(case, chunked):
    test_values_and_gradients_equal_the_reference(case, 2)


def test_chunks_stand_where_positions_say(chunked):
    test_positions_say_where_rows_stand("xla")


def test_second_derivative_through_chunks(chunked):
    q, _, _ = arrays((1, 10, 4, 8), groups=4)
    bias = RelativeBias(jax.random.normal(jax.random.key(0), (4, 8)), 6)

    def bent(implementation):
        def total(q, bias):
            out = attention(q, q, q, causal=True, bias=bias, implementation=implementation)
            return (out**2).sum()

        def norm(q, bias):
            return sum((x**2).sum() for x in jax.tree.leaves(jax.grad(total, (0, 1))(q, bias)))

        return jax.jit(jax.grad(norm, (0, 1)))(q, bias)

    got, want = (jax.tree.leaves(bent(x)) for x in ("xla", "reference"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_memory_is_linear_in_length():
    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        bias = RelativeBias(jax.ShapeDtypeStruct((1, 32), jnp.float32))

        def total(q, bias):
            segments = jnp.ones(q.shape[:2], jnp.int32)
            out = attention(
                q, q, q, causal=True, segments=segments, bias=bias, implementation="xla"
            )
            return out.sum()

        grad = jax.jit(jax.grad(total, (0, 1)))
        return grad.lower(q, bias).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(16384)
    assert long < 4.5 * short
    assert long < 16384**2 / 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_see_nothing(implementation):
    q, k, v = arrays((1, 4, 2, 8))
    segments = jnp.array([[1, 1, 0, 0]])

    def total(q, k, v):
        out = attention(q, k, v, segments=segments, implementation=implementation)
        return out.sum(), out

    grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    dq, dk, dv = grads
    assert not np.any(out[0, 2:])
    for grad in (dq, dk, dv):
        assert np.all(np.isfinite(grad))
        assert not np.any(grad[0, 2:])
    assert np.any(dv)


def enable_x64(on: bool):
    """jax.enable_x64, whose place differs between JAX versions."""
    return (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(on)


def test_reference_keeps_float64():
    with enable_x64(True):
        q, k, v = (x.astype(np.float64) for x in arrays((1, 6, 2, 8)))
        got = attention(q, k, v, causal=True, implementation="reference")
        assert got.dtype == np.float64
        want = brute_force(q, k, v, lambda b, t, s: s <= t)
        np.testing.assert_allclose(got, want, atol=1e-13)


@pytest.mark.parametrize("length", [1, 33, 200])
def test_bfloat16(length):
    q, k, v = arrays((1, length, 4, 16))
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    got = compiled(*low, causal=True)
    assert got.dtype == jnp.bfloat16
    want = compiled(*(x.astype(jnp.float32) for x in low), causal=True, implementation="reference")
    # One rounding of q, of p and of the result each, 2^-9 relative; values are of order one.
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=4 * 2**-8)


def test_under_transformations():
    q, k, v = arrays((2, 6, 4, 8))

    def f(q, implementation="xla"):
        return attention(q, k, v, causal=True, implementation=implementation)

    want = f(q)
    for g in (
        lambda q: jax.vmap(f)(jnp.stack([q, 2 * q]))[0],
        lambda q: jax.lax.map(jax.checkpoint(f), q[None])[0],
    ):
        np.testing.assert_allclose(jax.jit(g)(q), want, atol=1e-6)

    def bent(implementation):  # a second derivative, by reverse over reverse
        def g(q):
            return (f(q, implementation) ** 2).sum()

        return jax.jit(jax.grad(lambda q: (jax.grad(g)(q) ** 2).sum()))(q)

    np.testing.assert_allclose(bent("xla"), bent("reference"), rtol=1e-3, atol=1e-4)


def test_dropout_rate_and_scale():
    q, k = (jnp.zeros((1, 64, 2, 4)) for _ in range(2))
    v = jnp.ones((1, 64, 2, 1))
    out = attention(q, k, v, dropout=(0.25, jax.random.key(0)))
    # Each entry is the mean of 64 values, 0 or 1 / 0.75: deviation sqrt(1/3) / 8.
    assert abs(float(out.mean()) - 1) < 4 * math.sqrt(1 / 3 / 64 / 128)
    assert 0.05 < float(out.std()) < 0.1


def test_dropout_takes_entries_that_know_nothing_of_each_other():
    rate, size = 0.3, 256
    kept = np.asarray(dropouts.kept_of(dropouts.drawn(rate, jax.random.key(0), 2, 2, size, size)))
    assert abs(kept.mean() - 0.7) < 4 * math.sqrt(0.21 / kept.size)
    bits = (kept - 0.7) / math.sqrt(0.21)
    # Of entries apart by rows, columns, heads and rows of the batch, and of whole rows.
    for axis, step in ((3, 1), (3, 2), (2, 1), (2, 8), (1, 1), (0, 1)):
        product = bits * np.roll(bits, step, axis)
        assert abs(product.mean()) < 5 / math.sqrt(kept.size), (axis, step)
    rows = bits.reshape(-1, size)
    between = (rows @ rows.T / size)[np.triu_indices(len(rows), 1)]
    assert np.abs(between).max() < 6.5 / math.sqrt(size)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"implementation": "cuda"}, NotImplementedError, "implementation='cuda'"),
        ({"prefix": jnp.ones((1, 3), int)}, ValueError, "causal"),
        ({"segments": jnp.ones((1, 4), int)}, ValueError, "segments"),
        ({"kv_segments": jnp.ones((1, 3), int)}, ValueError, "without segments"),
        ({"window": 0}, ValueError, "window"),
    ],
)
def test_errors(change, error, message):
    q, k, v = arrays((1, 3, 4, 8))
    with pytest.raises(error, match=message):
        attention(q, k, v, **change)
    with pytest.raises(ValueError, match="divide"):
        attention(q, k[:, :, :1].repeat(3, 2), v[:, :, :1].repeat(3, 2))
