"""A Transformer with a head of classes in the place of the vocabulary's: for fine-tuning."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.models.base import Kind
from jaxpt.models.mlp import check_rate, dropout, project, projection
from jaxpt.models.network import Network
from jaxpt.models.transformer import Transformer
from jaxpt.weights.base import Scope

WITHOUT = ("tied", "output_bias", "head_transform", "logit_softcap")  # of the vocabulary's output


@dataclasses.dataclass(frozen=True)
class Headed(Transformer):
    """A Transformer that gives logits of ``classes`` at each position, and no tokens.

    What an objective makes of them is its own: of a sequence it looks at one position, of words at
    one each, for the place of an answer the two classes are its beginning and its end. A phase that
    goes on with a pretrained Transformer has it made by ``headed``:

        Phase(model=headed(pretrained, classes=3), begin=(Keep(fresh=("head*",)),), ...)
    """

    kind: Kind = "encoder"  # decoder honours the batch's prefix; encoder sees both ways
    classes: int = 2  # logits a position; 1 for a score
    head_hidden: bool = True  # a dense layer and tanh before them, as BERT's pooler has
    head_dropout: float = 0.1  # rate on what goes into the logits

    def __post_init__(self):
        super().__post_init__()
        if self.kind == "encoder_decoder":
            raise ConfigError(
                "kind", "an encoder_decoder has no head of classes; give its answers as text"
            )
        for field in WITHOUT:
            if getattr(self, field):
                raise ConfigError(field, "a head of classes has no output over the vocabulary")
        if self.classes < 1:
            raise ConfigError("classes", f"{self.classes} is not valid; give 1 or more")
        check_rate("head_dropout", self.head_dropout)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("classes",)

    def network(self, vocab_size: int, scope: Scope) -> HeadedNetwork:
        return HeadedNetwork(self, vocab_size, scope)


class HeadedNetwork(Network):
    """Called with a batch it gives states [B, T, D], of which ``classes`` makes logits."""

    def _make_output(self, scope: Scope) -> None:
        config = self.config
        assert isinstance(config, Headed)
        width = config.width
        if config.head_hidden:
            projection(self, scope, "head_hidden", width, width, ("embed", None), bias=True)
        projection(self, scope, "head_out", width, config.classes, ("embed", None), bias=True)

    def classes(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """float32 [B, T, C]: logits of the classes. ``key``: of dropout; None for none."""
        config = self.config
        assert isinstance(config, Headed)
        if config.head_hidden:
            x_BTD = jnp.tanh(project(self, "head_hidden", x_BTD))
        x_BTD = dropout(x_BTD, config.head_dropout, key)
        return project(self, "head_out", x_BTD.astype(jnp.float32))


def headed(pretrained: Transformer, classes: int, **changes: Any) -> Headed:
    """``pretrained`` with a head: all of its fields but those of its output, and ``changes``.

    Raises:
      ConfigError: a kind of Transformer whose fields do not say all that it is.
    """
    if type(pretrained) not in (Transformer, Headed):
        name = type(pretrained).__name__
        raise ConfigError("model", f"of {name} give the Transformer that it stands for: plain(...)")
    fields: dict[str, Any] = {
        f.name: getattr(pretrained, f.name) for f in dataclasses.fields(Transformer)
    }
    fields.update(tied=False, output_bias=False, head_transform=False, logit_softcap=None)
    fields.update(changes, classes=classes)
    return Headed(**fields)
