"""What the tests of the attention kernels share: rows, a comparison with the reference in float64,
and the shapes of models to compile for."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import RelativeBias, attention


def enable_x64(on: bool):
    """jax.enable_x64, whose place differs between JAX versions."""
    return (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(on)


def rows_of(rng, batch, length, documents=4, padding=20):
    """Segments of random documents in order, with padding at the end."""
    cuts = np.sort(rng.integers(0, length - padding, (batch, documents - 1)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)
    segments[:, length - padding :] = 0
    return segments.astype(np.int32)


def relative(heads, bidirectional, max_distance=128, buckets=32, seed=3):
    table = np.random.default_rng(seed).normal(size=(heads, buckets))
    return RelativeBias(jnp.asarray(table, jnp.float32), max_distance, bidirectional)


def reference(q, k, v, bias, marks, **static):
    return attention(q, k, v, bias=bias, implementation="reference", **marks, **static)


@functools.partial(jax.jit, static_argnums=(0, 7))
def with_gradients(kernel, q, k, v, bias, marks, weights, static):
    def total(q, k, v, bias):
        out = kernel(q, k, v, bias, marks, **dict(static))
        return (out.astype(weights.dtype) * weights).sum(), out

    grads, out = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, bias)
    return out, grads


def compare(kernel, shape, marks=None, bias=None, keys=None, groups=None, wide=None,
            dtype="float32", seed=0, sizes=None, **static):  # fmt: skip
    """``kernel(q, k, v, bias, marks, **static)`` against the reference in float64, on the same
    numbers. ``sizes`` of blocks are the kernel's alone."""
    rng = np.random.default_rng(seed)
    batch, queries, heads, width = shape
    keys, groups = keys or queries, groups or heads
    arrays = [
        np.asarray(jnp.asarray(rng.normal(size=s), dtype).astype(jnp.float32))
        for s in (shape, (batch, keys, groups, width), (batch, keys, groups, wide or width))
    ]
    weights = rng.normal(size=(batch, queries, heads, wide or width)).astype(np.float32)
    marks = {} if marks is None else marks
    low = [jnp.asarray(x, dtype) for x in arrays]
    options = tuple(sorted(static.items()))
    own = options if sizes is None else (*options, ("sizes", sizes))
    out, grads = with_gradients(kernel, *low, bias, marks, weights, own)
    assert out.dtype == low[0].dtype
    with enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), (*arrays, bias))
        want, want_grads = with_gradients(
            reference, *exact, marks, weights.astype(np.float64), options
        )
    # Errors of the products' operands (each rounded once or twice) average over the keys; those
    # of float32 sums grow with the logarithm of the length.
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-24 * (4 + np.log2(keys))
    for got, exact in zip(
        jax.tree.leaves((out, grads)), jax.tree.leaves((want, want_grads)), strict=True
    ):
        got, exact = np.asarray(got, np.float64), np.asarray(exact)
        assert np.all(np.isfinite(got))
        scale = max(1.0, np.abs(exact).max())
        np.testing.assert_allclose(got, exact, atol=4 * unit * scale)


def check_transformations(kernel, length):
    """Gradients under vmap, remat and scan, each within the next."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 2, 1, length, 2, 16)), jnp.float32)
    segments = np.stack([rows_of(rng, 2, length) for _ in range(2)])[:, :, None]

    def total(function, q, segments):
        return (function(q, q, q, None, {"segments": segments}, causal=True) ** 2).sum()

    def grads(function):
        each = jax.grad(jax.checkpoint(functools.partial(total, function)))
        return jax.lax.map(lambda x: jax.vmap(each)(*x), (q, jnp.asarray(segments)))

    got, want = (jax.jit(grads, static_argnums=0)(x) for x in (kernel, reference))
    np.testing.assert_allclose(got, want, atol=1e-4)


def check_second_derivative(kernel):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 20, 2, 8)), jnp.float32)
    bias = relative(2, bidirectional=True, max_distance=9, buckets=8)

    def bent(function):
        def total(q, bias):
            return (function(q, q, q, bias, {}, causal=True) ** 2).sum()

        def norm(q, bias):
            return sum((x**2).sum() for x in jax.tree.leaves(jax.grad(total, (0, 1))(q, bias)))

        return jax.jit(jax.grad(norm, (0, 1)))(q, bias)

    got, want = (jax.tree.leaves(bent(x)) for x in (kernel, reference))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


# heads, key heads, width, bias: T5 base, XXL, LLaMA 1B and 7B.
MODELS = {
    "t5 base": (12, 12, 64, "relative"),
    "t5 large": (16, 16, 64, "relative"),
    "t5 xl": (32, 32, 64, "relative"),
    "t5 xxl": (64, 64, 64, "relative"),
    "llama 1b": (32, 8, 64, None),
    "llama 7b": (32, 32, 128, None),
}


def step(bias_kind, implementation):
    """A function of (q, k, v, table, segments, do): the result and all gradients."""

    def run(q, k, v, table, segments, do):
        def f(q, k, v, table):
            bias = RelativeBias(table, 128, False) if bias_kind else None
            return attention(
                q, k, v, causal=True, segments=segments, bias=bias, implementation=implementation
            )

        out, pull = jax.vjp(f, q, k, v, table)
        return out, pull(do)

    return run


def shapes(model, length, batch=1, sharding=None):
    heads, groups, width, bias = MODELS[model]
    make = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    q, k = (make((batch, length, n, width), jnp.bfloat16) for n in (heads, groups))
    return bias, (
        q, k, k, make((heads, 32), jnp.float32), make((batch, length), jnp.int32), q,
    )  # fmt: skip


def assert_linear(compiled, model, length):
    """No array of a compiled ``step`` is as large as the scores of all heads, and what it holds
    for a while is less than nine arrays of heads of 128: it has eight arguments and results."""
    heads = MODELS[model][0]
    square = heads * length * length
    text = compiled.as_text()
    for kind, size in (("bf16", 2), ("f32", 4), ("pred", 1)):
        for match in re.finditer(rf"{kind}\[([\d,]+)\]", text):
            shape = tuple(int(n) for n in match.group(1).split(","))
            assert np.prod(shape) * size < square, f"{kind}{shape} is as large as the scores"
    assert compiled.memory_analysis().temp_size_in_bytes < 9 * heads * length * 128 * 2
