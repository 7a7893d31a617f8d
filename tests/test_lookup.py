"""Rows of a table: their gradient, by scatter and by sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.mesh import Mesh
from jaxpt.models import lookup as module
from jaxpt.models.lookup import lookup, summed


def expected(g, ids, rows):
    total = np.zeros((rows, g.shape[-1]), np.float64)
    inside = ids < rows
    np.add.at(total, ids[inside], g[inside].astype(np.float64))
    return total


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rows_are_summed(data):
    """Few ids (runs over many chunks), many, one that fills all, and some that are no row's; of
    rows of very different sizes none touches another's sum."""
    n = data.draw(st.sampled_from([1, 127, 128, 129, 700]))
    ids_of = data.draw(st.sampled_from([1, 2, 50, 400]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    ids = rng.integers(0, ids_of, n)
    g = rng.normal(size=(n, 3)).astype(np.float32) * np.where(ids % 2, 1e6, 1e-3)[:, None]
    g = g.astype(np.float32)
    rows = 40
    found = jax.jit(summed, static_argnums=2)(g, ids.astype(np.int32), rows)
    assert found.dtype == jnp.float32
    true = expected(g, ids, rows)
    size = expected(np.abs(g), ids, rows)
    assert np.all(np.abs(np.asarray(found, np.float64) - true) <= 1e-5 * size)


@pytest.mark.parametrize("mesh", [Mesh(devices=1), Mesh(data=2, fsdp=2, context=2)])
def test_both_ways_agree(monkeypatch, mesh):
    """The gradient as GPUs make it is that of a scatter, on one device and on eight, and has none
    in it."""
    ids = jax.random.randint(jax.random.key(0), (4, 64), 0, 30)
    table = jax.random.normal(jax.random.key(1), (50, 8))
    layout = mesh.build()

    def gradient(table, ids):
        return jax.grad(lambda t: jnp.sum(jnp.sin(lookup(t, ids)) ** 2))(table)

    with layout.active():
        jitted = jax.jit(gradient, in_shardings=(None, layout.sharding(("batch", "length"))))
        scattered = jitted(table, ids)
        assert "scatter" in jitted.lower(table, ids).as_text()
        monkeypatch.setattr(module, "platform", lambda: "gpu")
        jax.clear_caches()
        summed_up = jitted(table, ids)
        assert "scatter" not in jitted.lower(table, ids).as_text()
    np.testing.assert_allclose(summed_up, scattered, rtol=1e-5, atol=1e-6)
