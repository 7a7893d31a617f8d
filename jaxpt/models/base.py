"""What a model's config is, whether the model is one network or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from jaxpt.errors import ConfigError
from jaxpt.weights.base import Product, Rules, Scope

if TYPE_CHECKING:
    from flax import nnx

    from jaxpt.models.model import Model

Kind = Literal["decoder", "encoder", "encoder_decoder"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Config of a model: what stands in ``Run.model``; subclasses live in a file each.

    ``Transformer`` is one network. A model of several says which (``networks``), makes them in
    ``network`` and lets an objective ask for their ``outputs``; tensors, FLOPs, shardings and
    patterns follow from the tables, in which each network's paths begin with its name.
    """

    @property
    def kind(self) -> Kind:
        """Which fields a batch has, and whether a stack sees both ways."""
        raise NotImplementedError

    @property
    def outputs(self) -> tuple[str, ...]:
        """What it gives for each position: "tokens" (logits over the vocabulary), or what an
        objective of its own asks for. Run and objective must agree: see ``Objective.outputs``."""
        return ("tokens",)

    @property
    def max_length(self) -> int | None:
        """Positions of a row that it can serve at most; None where there is no end."""
        return None

    @property
    def networks(self) -> Mapping[str, ModelConfig]:
        """Name -> config of each network; where there is one, it is called ""."""
        return {"": self}

    @property
    def rules(self) -> Rules:
        """Weights and initialisers of its own tensors; a network within brings its own."""
        return Rules(())

    @property
    def stacked(self) -> bool:
        """Whether its layers are stacked on a leading axis and scanned; see ``with_stacks``."""
        return all(network.stacked for network in self.networks.values())

    def with_stacks(self) -> ModelConfig:
        """The same model with stacked layers: its parameters are these, stacked, and what the
        layers must have to be alike."""
        raise NotImplementedError

    def validate(self, length: int, target_length: int | None = None) -> None:
        """Whether rows of these lengths can be served.

        Args:
          length: positions of a row of the only stack, or of the encoder.
          target_length: positions of a row of the decoder of an encoder-decoder; else None.

        Raises:
          ConfigError: a length that is missing, superfluous, or beyond the position table.
        """
        raise NotImplementedError

    def network(self, vocab_size: int, scope: Scope) -> nnx.Module:
        """The module that an objective gets, with fresh tensors made through ``scope``."""
        raise NotImplementedError

    def flops(
        self,
        products: Mapping[str, Product],
        vocab_size: int,
        batch: int,
        length: int,
        target_length: int | None,
    ) -> float:
        """Floating-point operations of a forward pass, of all networks together."""
        total = 0.0
        for name, network in self.networks.items():
            own = {p[len(name) + 1 :]: v for p, v in products.items() if p.startswith(f"{name}/")}
            total += network.flops(own, vocab_size, batch, length, target_length)
        return total

    def rate_scales(self, optimizer: Any, vocab_size: int) -> Mapping[str, float]:
        """Path -> factor of the learning rate that this optimizer (a config) is to have there; 1
        for what is left out. The pull of weight decay stays as it is.

        Raises:
          ConfigError: an optimizer that the model has no factors for.
        """
        return {}

    def build(self, vocab_size: int) -> Model:
        """The model. Raises ConfigError, e.g. for path patterns that match nothing."""
        from jaxpt.models.model import Model

        return Model(self, vocab_size)


def check_outputs(wanted: tuple[str, ...], objective: Any, model: ModelConfig) -> None:
    """Raises ConfigError unless the objective trains just what the model gives."""
    if set(wanted) == set(model.outputs):
        return
    raise ConfigError(
        "objective",
        f"{type(objective).__name__} trains a model that gives {' and '.join(wanted)}; "
        f"{type(model).__name__} gives {' and '.join(model.outputs)}",
    )
