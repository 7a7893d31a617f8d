"""Rows of a table: their gradient, by scatter and by sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.hlo import traffic
from jaxpt.mesh import Mesh, single
from jaxpt.models import lookup as module
from jaxpt.models.lookup import embedded, lookup, summed


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


@pytest.mark.parametrize(
    ("chip", "mesh"),
    [("cpu", Mesh(data=2, fsdp=2, tensor=2)), ("gpu", Mesh(data=1, fsdp=4, context=2))],
)
def test_rows_are_handed_round(monkeypatch, chip, mesh):
    """Where a device has fewer tokens than the table rows: the same gradient as on one device, by
    exchanges no larger than it or the rows themselves."""
    monkeypatch.setattr(module, "platform", lambda: chip)
    ids = jax.random.randint(jax.random.key(0), (8, 8), 0, 60)
    table = jax.random.normal(jax.random.key(1), (128, 16))
    weights = jax.random.normal(jax.random.key(2), (8, 8, 16))

    def value(table, ids, weights):
        return jnp.sum(weights * jnp.sin(embedded(table, ids, jnp.float32)))

    layout = mesh.build()
    lies, rows = layout.sharding(("vocab", "embed")), layout.sharding(("batch", "length", "width"))
    places = (lies, layout.sharding(("batch", "length")), rows)
    with layout.active():
        jitted = jax.jit(jax.grad(value), in_shardings=places, out_shardings=lies)
        compiled = jitted.lower(table, ids, weights).compile()
        few = jax.make_jaxpr(value)(table[:4], ids, weights)
    assert "all_to_all" not in str(few), "more tokens than rows: the table is gathered"
    found = traffic(compiled.as_text(), dict(layout.mesh.shape)).collectives
    own = 4 * table.size // layout.ways("vocab") // layout.ways("embed")
    assert found
    assert all(each.bytes <= max(own, 4 * weights.size // 2) for each in found), found
    with single().active():
        expected = jax.grad(value)(table, ids, weights)
    np.testing.assert_allclose(compiled(table, ids, weights), expected, rtol=1e-5, atol=1e-6)
