"""A model's parameters as unrolled layers of dense matrices, and back."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxpt.models.model import Model
from jaxpt.models.transformer import Transformer
from jaxpt.state import Params, flatten, unflatten
from jaxpt.weights.base import Product
from jaxpt.weights.dense import Dense

LAYER = re.compile(r"(?<=/layers)_(\d+)(?=/)")


def dense_model(config: Transformer, vocab_size: int) -> Model:
    """The same model with a full matrix for every weight, which is what all others know."""
    return Model(dataclasses.replace(config, weights=(("*", Dense()),)), vocab_size)


def unrolled_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Path in unrolled layers -> shape, with as many rows as the vocabulary has."""
    found = {}
    for path, tensor in model.tensors.items():
        shape = tuple(
            model.vocab_size if axis == "vocab" else size
            for size, axis in zip(tensor.shape, tensor.axes, strict=True)
        )
        if tensor.stacked:
            layers = range(tensor.shape[0])
            found |= {path.replace("/layers/", f"/layers_{i}/"): shape[1:] for i in layers}
        else:
            found[path] = shape
    return found


def held_at(model: Model, path: str) -> tuple[str, int | None]:
    """Where a path in unrolled layers is: the parameter's own, and which of its layers, if any."""
    found = LAYER.search(path) if model.config.stacked else None
    return (path, None) if found is None else (LAYER.sub("", path), int(found[1]))


class Held(Mapping[str, np.ndarray]):
    """Parameters by path in unrolled layers, on the host, each fetched when it is asked for:
    matrices dense, and the vocabulary without padding."""

    def __init__(self, model: Model, params: Params):
        self.model, self._flat = model, flatten(params)
        self._dense = dense_model(_transformer(model), model.vocab_size)
        self._paths = unrolled_shapes(self._dense)

    def __getitem__(self, path: str) -> np.ndarray:
        if path not in self._paths:
            raise KeyError(path)
        at, layer = held_at(self.model, path)
        weight = at.removesuffix("/w")
        product = self.model.products.get(weight) if weight != at else None
        if product is None or isinstance(product.weight, Dense):
            array = self._flat[at] if layer is None else self._flat[at][layer]
        else:
            start = f"{weight}/"
            own = {n[len(start) :]: x for n, x in self._flat.items() if n.startswith(start)}
            own = own if layer is None else {name: x[layer] for name, x in own.items()}
            array = _dense_of(product, own)
        whole = np.asarray(jax.device_get(array))
        return whole[tuple(slice(size) for size in self._paths[path])]

    def __iter__(self):
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


@functools.lru_cache(maxsize=64)
def _program(product: Product):
    return jax.jit(lambda params: product.module(params).dense())


def _dense_of(product: Product, flat: Mapping[str, Any]) -> Any:
    return _program(product)(unflatten(dict(flat)))


def gathered(model: Model, arrays: Mapping[str, np.ndarray]) -> Params:
    """The parameters of a model, on the host.

    Args:
      arrays: by path in unrolled layers, the vocabulary without padding, which becomes zeros.
    """
    flat = {}
    for path, tensor in model.tensors.items():
        out = np.zeros(tensor.shape, tensor.dtype)
        if tensor.stacked:
            for i, layer in enumerate(out):
                _put(layer, arrays[path.replace("/layers/", f"/layers_{i}/")])
        else:
            _put(out, arrays[path])
        flat[path] = out
    return unflatten(flat)


def _put(out: np.ndarray, array: np.ndarray) -> None:
    out[tuple(slice(size) for size in array.shape)] = array


def _transformer(model: Model) -> Transformer:
    assert isinstance(model.config, Transformer)
    return model.config
