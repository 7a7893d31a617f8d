"""Second derivatives of the kernels' results, by XLA."""

from __future__ import annotations

import jax

from kernels.attention import xla


def derivative_of_gradients(arguments: dict, saved, g, cotangents):
    """The gradients' own derivative: of ``saved`` (q, k, v, bias) and of ``g``, the gradient of the
    result, from the ``cotangents`` of the four gradients. ``arguments``: the other ones of
    ``kernels.attention.attention``, with ``scale`` given."""

    def first(q, k, v, bias, g):
        def attend(q, k, v, bias):
            return xla.attention(q, k, v, bias=bias, **arguments)

        return jax.vjp(attend, q, k, v, bias)[1](g)

    return jax.vjp(first, *saved, g)[1](cotangents)
