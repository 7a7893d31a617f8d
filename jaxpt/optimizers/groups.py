"""Parameter groups: ordered path patterns that say how each parameter is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxpt.errors import ConfigError
from jaxpt.paths import known, matches
from jaxpt.weights.base import Tensor

Tensors = Mapping[str, Tensor]  # the model's table: parameter path -> shape, axes, weight type

NO_MATRIX = (
    "norm",
    "bias",
    "embedding",
    "sparse",
    "rows",
    "index",
)  # kinds (``Tensor.weight``) that are no matrix products


@dataclasses.dataclass(frozen=True)
class Group:
    """How the parameters whose paths match ``pattern`` are trained; the first group to match wins.

    Patterns are shell-style over paths (``*/mlp/*``, ``decoder/layers/attention/q/w``), with or
    without layer numbers.
    """

    pattern: str  # which parameters, shell-style over their paths
    lr_scale: float = 1.0  # multiplies the learning rate, and with it the weight decay
    weight_decay: float | None = None  # instead of the optimizer's; also for norms and biases
    frozen: bool = False  # no change and no optimizer state

    def __post_init__(self):
        if not self.lr_scale >= 0:
            raise ConfigError("lr_scale", f"{self.lr_scale} is not valid; give a number >= 0")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ConfigError(
                "weight_decay", f"{self.weight_decay} is not valid; give a number >= 0, or None"
            )
        if self.frozen and (self.lr_scale != 1.0 or self.weight_decay is not None):
            raise ConfigError("frozen", "a frozen group has no learning rate and no weight decay")


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What the groups come to for one parameter."""

    lr_scale: float
    weight_decay: float
    frozen: bool

    def scaled(self, by: float) -> Treatment:
        """With a learning rate so many times as large, and the same pull of weight decay."""
        decay = self.weight_decay / by
        return dataclasses.replace(self, lr_scale=self.lr_scale * by, weight_decay=decay)


def is_matrix(tensor: Tensor) -> bool:
    """Whether the tensor is a matrix that multiplies activations (one per layer where stacked).

    Norms, biases (relative position biases too), embeddings and the entries of sparse matrices are
    none; the output projection is.
    """
    return len(tensor.shape) - tensor.stacked >= 2 and tensor.weight not in NO_MATRIX


def is_inner_matrix(tensor: Tensor) -> bool:
    """Whether the tensor is a matrix inside the network: not the projection to the vocabulary, and
    not the blocks of a sparse matrix."""
    whole = len(tensor.shape) - tensor.stacked == 2
    return is_matrix(tensor) and whole and "vocab" not in tensor.axes


def resolve(
    groups: tuple[Group, ...], weight_decay: float, tensors: Tensors
) -> dict[str, Treatment]:
    """The treatment of every parameter.

    Without a group's word, weight decay applies to matrices alone. Embeddings get none: rows of
    rare tokens would only shrink, which makes the first layer's gradients large (OLMo 2, 2025);
    ``Group("*embed*", weight_decay=0.1)`` gives them some. Tensors of integers are frozen.

    Raises:
      ConfigError: a group that no parameter belongs to.
    """
    chosen = {
        path: next((i for i, g in enumerate(groups) if matches(g.pattern, path)), None)
        for path in tensors
    }
    for i, group in enumerate(groups):
        if i in chosen.values():
            continue
        if any(matches(group.pattern, path) for path in tensors):
            message = f"{group.pattern!r} matches only what earlier groups have; put it before them"
        else:
            message = f"{group.pattern!r} matches no parameter; known: {known(tensors)}"
        raise ConfigError(f"groups.{i}.pattern", message)
    treatments = {}
    for path, tensor in tensors.items():
        index = chosen[path]
        group = Group(path) if index is None else groups[index]
        decay = weight_decay if is_matrix(tensor) else 0.0
        treatments[path] = Treatment(
            group.lr_scale,
            decay if group.weight_decay is None else group.weight_decay,
            group.frozen or not tensor.trained,
        )
    return treatments
