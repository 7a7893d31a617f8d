"""Depth growth: a deeper model made of copies of a shallower one's layers."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.errors import ConfigError
from jaxpt.growth.base import Transition
from jaxpt.paths import known, matches
from jaxpt.state import flatten, unflatten

Order = Literal["stack", "interleave"]


@dataclasses.dataclass(frozen=True)
class Stack(Transition):
    """Every stacked tensor [L, ...] becomes [L', ...], L' >= L, made of the old layers; the others
    stay as they are.

        stack         new layer l is old layer l mod L              0 1 2 0 1 2
        interleave    new layer l is old layer floor(l L / L')      0 0 1 1 2 2

    ``stack`` is progressive stacking (Gong et al. 2019, where L' = 2 L). With
    ``zero`` naming the matrices that write into the residual stream (``*/attention/out/*``,
    ``*/mlp/down/*``), those of the added layers start at 0, so that a pre-norm model computes
    at first what it computed before.
    """

    order: Order = "stack"  # which old layer a new one copies
    zero: tuple[str, ...] = ()  # patterns of stacked tensors that start at 0 in the added layers

    def __post_init__(self):
        if self.order not in ("stack", "interleave"):
            raise ConfigError("order", f"{self.order!r} is not stack or interleave")

    def source(self, before: int, after: int) -> np.ndarray:
        """The old layer, int [after], that each new layer copies."""
        layers = np.arange(after)
        return layers % before if self.order == "stack" else layers * before // after

    def validate(self, old, new):
        """Raises ConfigError unless the models differ in the number of stacked layers alone."""
        if old.tensors.keys() != new.tensors.keys():
            paths = known(old.tensors.keys() ^ new.tensors.keys())
            raise ConfigError("model", f"only the depth of stacked layers may differ, not: {paths}")
        for path, tensor in new.tensors.items():
            before = old.tensors[path]
            if before.stacked and tensor.stacked:
                same = before.shape[1:] == tensor.shape[1:] and before.shape[0] <= tensor.shape[0]
            else:
                same = before.shape == tensor.shape and before.stacked == tensor.stacked
            if not same:
                raise ConfigError(
                    "model",
                    f"{path} is {before.shape} before this phase and {tensor.shape} in it; only "
                    "the number of stacked layers may grow",
                )
        for i, pattern in enumerate(self.zero):
            stacked = [path for path, tensor in new.tensors.items() if tensor.stacked]
            if not any(matches(pattern, path) for path in stacked):
                raise ConfigError(
                    f"zero.{i}",
                    f"{pattern!r} matches no stacked parameter; known: {known(stacked)}",
                )

    def __call__(self, params, old, new, key):
        self.validate(old, new)
        grown = {
            path: self._grow(path, value, old.tensors[path], new.tensors[path])
            for path, value in flatten(params).items()
        }
        return unflatten(grown)

    def _grow(self, path: str, value: jax.Array, old, new) -> jax.Array:
        if not old.stacked:
            return value
        source = self.source(old.shape[0], new.shape[0])
        copies = value[source]
        if not any(matches(pattern, path) for pattern in self.zero):
            return copies
        first = np.unique(source, return_index=True)[1]  # of each old layer's copies, the first
        added = np.setdiff1d(np.arange(len(source)), first)
        return copies.at[added].set(jnp.zeros((), copies.dtype))
