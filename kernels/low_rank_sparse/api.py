"""The public functions; their docstrings are the contract of every implementation."""

from __future__ import annotations

from typing import Literal, get_args

import jax

from kernels.low_rank_sparse import reference, xla

Implementation = Literal["reference", "xla"]


def low_rank_sparse(
    x: jax.Array,
    a_IR: jax.Array,
    b_RO: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    *,
    scale: float = 1.0,
    group: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """x (scale A B + S), S sparse on a fixed support (Han et al. 2024, "SLTrain", section 3).

    The backward pass keeps x, A, B, the values and their places, and no matrix of A B's size.

    Args:
      x: float [..., I].
      a_IR: float [I, R].
      b_RO: float [R, O].
      values: float, the entries of S that are held; see ``kernels.low_rank_sparse.support``.
      indices: integers of the same shape, their places.
      scale: of A B.
      group: one entry of every ``group`` consecutive ones of a row is held; None: any are, by
        number, distinct and ascending.
      implementation: "xla" (the default) or "reference" (gradients by JAX; any dtype).

    Returns:
      [..., O] in x's dtype. Gradients flow to x, A, B and the values; that of the whole matrix is
      formed in x's dtype on the way.

    Raises:
      ValueError: shapes that do not fit, a group that is not within 1 to 256, an unknown
        implementation.
    """
    check(a_IR, b_RO, values, indices, group)
    if x.shape[-1] != a_IR.shape[0]:
        raise ValueError(f"x{list(x.shape)} and A{list(a_IR.shape)} do not fit")
    if implementation == "reference":
        return reference.low_rank_sparse(x, a_IR, b_RO, values, indices, scale, group)
    if implementation not in (None, "xla"):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"unknown implementation {implementation!r}; give {known} or None")
    return xla.low_rank_sparse(x, a_IR, b_RO, values, indices, scale, group)


def materialise(
    a_IR: jax.Array,
    b_RO: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    *,
    scale: float = 1.0,
    group: int | None = None,
) -> jax.Array:
    """scale A B + S [I, O], in the values' dtype; arguments as of ``low_rank_sparse``."""
    check(a_IR, b_RO, values, indices, group)
    return xla.materialise(a_IR, b_RO, values, indices, scale, group, values.dtype)


def check(a, b, values, indices, group) -> None:
    """Raises ValueError where the parts of a matrix do not fit one another."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"A{list(a.shape)} and B{list(b.shape)} do not fit")
    if group is not None and not 1 <= group <= 256:
        raise ValueError(f"group={group} does not lie in 1 to 256")
    held = values.shape[:1] if group is None else (a.shape[0], -(-b.shape[1] // group))
    if values.shape != held or indices.shape != held:
        raise ValueError(
            f"values{list(values.shape)} and indices{list(indices.shape)} do not fit a matrix "
            f"[{a.shape[0]}, {b.shape[1]}] with group={group}"
        )
