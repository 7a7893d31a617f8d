"""What an export keeps of matrices that are not held dense, beside their dense form.

``factors.safetensors`` holds every parameter of such a matrix by our path, unrolled layers and the
vocabulary without padding (``decoder/layers_0/mlp/up/a``), in the type that it has, and in its
metadata, under ``weights``, the patterns of ``Transformer.weights`` as JSON. transformers does not
look at it; ``hf.read`` does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jaxpt.config import codec
from jaxpt.errors import DataError
from jaxpt.interop.held import held_at, unrolled_shapes
from jaxpt.interop.safetensors import SafeTensors, write
from jaxpt.models.model import Model
from jaxpt.models.transformer import Transformer
from jaxpt.state import Params, flatten
from jaxpt.weights.base import Weight
from jaxpt.weights.dense import Dense

FILE = "factors.safetensors"


@dataclasses.dataclass(frozen=True)
class Factors:
    """What the metadata says."""

    weights: tuple[tuple[str, Weight], ...]  # as ``Transformer.weights``


def write_factors(folder: Path, model: Model, params: Params) -> None:
    """Writes the file; nothing where every matrix is dense."""
    flat, shapes = flatten(params), unrolled_shapes(model)
    held = [
        f"{p}/" for p, product in model.products.items() if not isinstance(product.weight, Dense)
    ]
    arrays = {}
    for path, shape in shapes.items():
        at, layer = held_at(model, path)
        if any(at.startswith(start) for start in held):
            array = flat[at] if layer is None else flat[at][layer]
            array = np.asarray(jax.device_get(array))
            arrays[path] = array[tuple(slice(size) for size in shape)]
    if arrays:
        assert isinstance(model.config, Transformer)
        text = codec.to_json(Factors(model.config.weights))
        write(folder / FILE, arrays, {"weights": text})


def read_factors(
    folder: Path, config: Transformer, vocab_size: int
) -> tuple[Transformer, SafeTensors]:
    """The config with the weights of the file, and its arrays.

    Raises:
      DataError: a file that is not sound, or does not fit the config.
    """
    file = SafeTensors(folder / FILE)
    try:
        found = codec.from_json(file.metadata.get("weights", ""), Factors)
        config = dataclasses.replace(config, weights=found.weights)
        shapes = unrolled_shapes(Model(config, vocab_size))
    except ValueError as error:
        raise DataError(f"{folder / FILE}: {error}") from None
    for path in file:
        if shapes.get(path) != file.shape(path):
            said = f"{path} {file.shape(path)}, which is {shapes.get(path)} in the model"
            raise DataError(f"{folder / FILE}: {said}")
    return config, file
