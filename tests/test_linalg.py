"""Decompositions under vmap: one after the other on CPUs, where batches of them can hang."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_run

from jaxpt.optimizers import LORO, GaLore
from jaxpt.program import Program
from jaxpt.weights import Dense, LowRank
from kernels import linalg
from kernels.platform import compiling_for

NAMES = {"svd", "qr", "geqrf", "householder_product", "triangular_solve"}
LOW_RANK = {"model.weights": (("*/mlp/*", LowRank(4)), ("*", Dense()))}


def decompositions(jaxpr):
    """(name, dimensions of what is decomposed) of all in a program, inner ones included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in NAMES:
            found.append((equation.primitive.name, equation.invars[0].aval.ndim))
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += decompositions(inner)
    return found


def test_a_batch_is_worked_off_in_turn_on_cpus_alone():
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    for platform, dimensions in (("cpu", 2), ("gpu", 3)):
        with compiling_for(types.SimpleNamespace(platform=platform)):
            for function in (linalg.svd, linalg.qr):
                found = decompositions(jax.make_jaxpr(jax.vmap(function))(x).jaxpr)
                assert found
                assert {ndim for _, ndim in found} == {dimensions}


def test_results_are_numpys():
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    u, s, vt = jax.vmap(linalg.svd)(x)
    np.testing.assert_allclose(s, np.linalg.svd(x)[1], rtol=1e-5)
    np.testing.assert_allclose((u * s[:, None]) @ vt, x, atol=1e-5)
    q, r = jax.vmap(linalg.qr)(x)
    np.testing.assert_allclose(q @ r, x, atol=1e-5)
    assert np.abs(np.tril(r, -1)).max() == 0
    right = x[:, :4, :3]
    for transposed in (False, True):
        solve = jax.vmap(lambda r, b, t=transposed: linalg.solve_triangular(r, b, transposed=t))
        solved = solve(r, right)
        matrix = jnp.swapaxes(r, 1, 2) if transposed else r
        np.testing.assert_allclose(matrix @ solved, right, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        LOW_RANK,
        LOW_RANK | {"optimizer": LORO()},
        {"optimizer": GaLore(rank=4)},
        {"optimizer": GaLore(rank=4, method="iterate", random_after=3)},
    ],
    ids=["spectral", "loro", "galore", "golore"],
)
def test_no_program_of_ours_decomposes_a_batch(changes, tmp_path):
    run = tiny_run(tmp_path, **changes)
    program = Program(run, 0, run.tokenizer.build().vocabulary, run.mesh.build())
    with program.layout.active():
        traced = jax.make_jaxpr(program._fresh)(jax.random.key(0))
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = jax.make_jaxpr(program.step_function)(program.abstract, program.abstract_batch, key)
    found = [*decompositions(traced.jaxpr), *decompositions(step.jaxpr)]
    assert found
    assert {ndim for _, ndim in found} == {2}
