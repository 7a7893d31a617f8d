"""Decompositions of one matrix, safe to ``vmap``.

On CPUs jaxlib shares a batch of decompositions out to the threads of XLA's pool, and the thread
that asked waits for them. Where a program does as many batches at once as the pool has threads,
all of them wait, for ever: on two cores the spectral initialisation of a model with stacked layers
hung (JAX 0.10.2; ``ParallelBatchMap`` in its lapack_kernels.cc). There a batch is worked off one
matrix after the other instead, which the asking thread does itself. (No gradients.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import custom_batching

from kernels.platform import platform


def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(u [n, k], s [k], vt [k, m]) of [n, m], with k the smaller of the two."""
    return _alone(functools.partial(jnp.linalg.svd, full_matrices=False))(matrix)


def qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(q [n, k], r [k, m]) of [n, m], with k the smaller of the two."""
    return _alone(lambda matrix: tuple(jnp.linalg.qr(matrix)))(matrix)


def solve_triangular(matrix: jax.Array, right: jax.Array, *, transposed: bool = False) -> jax.Array:
    """x [n, m] with R x = right, or R^T x = right, for an upper triangular R [n, n]."""
    solve = functools.partial(jax.scipy.linalg.solve_triangular, trans=int(transposed))
    return _alone(solve)(matrix, right)


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, that maps over a batch in turn on CPUs."""
    return custom_batching.sequential_vmap(function) if platform() == "cpu" else function
