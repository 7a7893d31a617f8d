"""The product with a sparse-plus-low-rank matrix against float64, and what it compiles to."""

import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import benchmark
from kernels.low_rank_sparse import gather, held_shape, low_rank_sparse, materialise, spread
from kernels.platform import compiling_for

GROUPS = {"grouped": 4, "remainder": 5, "any": None}
NAMES = ("x", "a", "b", "values")
SCALE = 1.75


def make(d_in, d_out, rank, group, seed=0):
    """(float64 arrays by name, indices): a support drawn with numpy."""
    rng = np.random.default_rng(seed)
    if group is None:
        count = max(1, round(0.2 * d_in * d_out))
        indices = np.sort(rng.choice(d_in * d_out, count, replace=False)).astype(np.int32)
    else:
        shape = held_shape(d_in, d_out, group)
        width = np.minimum(group, d_out - group * np.arange(shape[1]))
        indices = rng.integers(0, width, shape).astype(np.uint8)
    shapes = ((2, 3, d_in), (d_in, rank), (rank, d_out), indices.shape)
    return {n: rng.normal(size=s) for n, s in zip(NAMES, shapes, strict=True)}, indices


def sparse(values, indices, d_in, d_out, group):
    """S in numpy, entry by entry."""
    s = np.zeros((d_in, d_out))
    for at in np.ndindex(*indices.shape):
        i, j = divmod(indices[at], d_out) if group is None else (at[0], at[1] * group + indices[at])
        s[i, j] = values[at]
    return s


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(6, 16, 3), (16, 8, 4), (5, 9, 2)])
def test_the_product_and_its_gradients(group, d_in, d_out, rank):
    """Han et al., equations 2 and 3: every implementation against numpy in float64."""
    arrays, indices = make(d_in, d_out, rank, group)
    x, a, b, values = arrays.values()
    g = np.random.default_rng(1).normal(size=(2, 3, d_out))
    places = sparse(np.ones_like(values), indices, d_in, d_out, group)
    assert places.sum() == values.size  # distinct
    w = SCALE * a @ b + sparse(values, indices, d_in, d_out, group)
    dw = np.einsum("bti,bto->io", x, g)
    held = sparse(np.arange(1, values.size + 1).reshape(values.shape), indices, d_in, d_out, group)
    order = np.argsort(held[held > 0])
    dvalues = dw[held > 0][order].reshape(values.shape)
    want = (g @ w.T, SCALE * dw @ b.T, SCALE * a.T @ dw, dvalues)

    single = tuple(jnp.float32(t) for t in arrays.values())
    for name in ("xla", "reference"):

        def f(*arrays, name=name):
            return low_rank_sparse(
                *arrays, jnp.asarray(indices), scale=SCALE, group=group, implementation=name
            )

        @jax.jit
        def both(g, *arrays, f=f):
            y, pull = jax.vjp(f, *arrays)
            return y, pull(g)

        y, gradients = both(jnp.float32(g), *single)
        np.testing.assert_allclose(y, x @ w, atol=5e-5)
        for of, got, expected in zip(NAMES, gradients, want, strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-4, err_msg=f"{name}: {of}")
    made = materialise(*single[1:], jnp.asarray(indices), scale=SCALE, group=group)
    np.testing.assert_allclose(made, w, atol=2e-5)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_gather_takes_what_spread_puts(group):
    arrays, indices = make(7, 11, 1, group)
    made = spread(jnp.float32(arrays["values"]), jnp.asarray(indices), 7, 11, group)
    np.testing.assert_allclose(made, sparse(arrays["values"], indices, 7, 11, group), rtol=1e-6)
    again = gather(made, jnp.asarray(indices), group)
    np.testing.assert_array_equal(again, jnp.float32(arrays["values"]))


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_backward_pass_keeps_no_matrix(group):
    """What lives between the passes: x, the factors, the values and their places."""
    d_in, d_out = 64, 48
    arrays, indices = make(d_in, d_out, 4, group)
    arrays = {name: jnp.float32(array) for name, array in arrays.items()}

    def f(x, a, b, values):
        return low_rank_sparse(x, a, b, values, jnp.asarray(indices), scale=2.0, group=group)

    kept = jax.tree.leaves(jax.vjp(f, *arrays.values())[1])  # what the backward pass closes over
    assert [t for t in kept if t.size >= d_in * d_out] == []
    assert {t.shape for t in kept} <= {t.shape for t in (*arrays.values(), indices)}


def test_bfloat16_gradients_come_in_the_parameters_dtype():
    arrays, indices = make(16, 8, 4, 4)
    x, *rest = (jnp.float32(array) for array in arrays.values())

    def f(x, *rest):
        return low_rank_sparse(x, *rest, jnp.asarray(indices), group=4).astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))
    exact, got = gradients(x, *rest), gradients(x.astype(jnp.bfloat16), *rest)
    assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32]
    for g, e in zip(got, exact, strict=True):
        assert float(jnp.abs(g - e).max()) < 0.03 * float(jnp.abs(e).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 5))}, "do not fit"),
        ({"b_RO": jnp.ones((3, 8))}, "do not fit"),
        ({"values": jnp.ones((6, 3))}, "do not fit a matrix"),
        ({"group": 300}, "group=300"),
        ({"group": None}, "group=None"),
        ({"implementation": "pallas"}, "give reference, xla or None"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {
        "x": jnp.ones((2, 6)),
        "a_IR": jnp.ones((6, 2)),
        "b_RO": jnp.ones((2, 8)),
        "values": jnp.ones((6, 2)),
        "indices": jnp.zeros((6, 2), jnp.uint8),
        "group": 4,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        low_rank_sparse(**(given | change))  # type: ignore[arg-type]


def test_the_benchmark_prints_what_it_measured(capsys):
    """At a size where times mean nothing; what is counted does."""
    argv = ["low_rank_sparse", "--json", "--widths", "64", "--ranks", "0.25", "--tokens", "128"]
    benchmark.main([*argv, "--rounds", "1", "--round-seconds", "0"])
    rows = {row["weight"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == [
        "dense",
        "low rank",
        "xla, grouped",
        "xla, uniform",
        "reference, grouped",
        "reference, uniform",
    ]
    for row in rows.values():
        assert (row["d_in"], row["d_out"], row["rank"], row["tokens"]) == (64, 64, 16, 128)
        assert row["forward ms"] > 0
        assert row["forward + backward ms"] > 0
    dense, ours = rows["dense"], rows["xla, grouped"]
    assert dense["forward, x dense"] == dense["forward + backward, x dense"] == 1
    # T = 128, R = 16: 8 R d^2 more than the dense one's 6 T d^2.
    assert ours["forward + backward, x dense, operations"] == pytest.approx(1 + 8 * 16 / (6 * 128))
    assert rows["low rank"]["forward, x dense, operations"] == 0.5
    # x, the factors, the values and a byte for each; the dense one keeps its matrix.
    assert ours["kept MiB"] == (4 * (128 * 64 + 2 * 64 * 16 + 64 * 2) + 64 * 2) / 2**20
    assert dense["kept MiB"] == 4 * (128 * 64 + 64 * 64) / 2**20


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_grouped_support_scatters_nothing(platform):
    """And gathers on CPUs alone; ordered, distinct indices are said to be so."""
    text = {}
    for group in (4, None):
        arrays, indices = make(16, 8, 4, group)
        arrays = [jnp.float32(array) for array in arrays.values()]

        def f(x, a, b, values, indices, group=group):
            return low_rank_sparse(x, a, b, values, indices, group=group).sum()

        with compiling_for(types.SimpleNamespace(platform=platform)):
            traced = jax.jit(jax.grad(f, argnums=(0, 1, 2, 3))).trace(*arrays, indices)
        text[group] = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.scatter" not in text[4]
    assert ("stablehlo.gather" in text[4]) == (platform == "cpu")
    scatters = re.findall(r'stablehlo\.scatter"\(.*?<{(.*?)}>', text[None], re.S)
    assert len(scatters) == 1  # the sum needs no forward pass: that of the backward pass alone
    for flags in scatters:
        assert "indices_are_sorted = true" in flags
        assert "unique_indices = true" in flags
