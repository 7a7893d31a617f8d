"""One or two texts, and their class or score (Devlin et al. 2019, section 4.1)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data.base import Source
from jaxpt.data.labelled import Case, Cases
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError
from jaxpt.objectives.base import Batch, Features, Loss
from jaxpt.objectives.labelled import HeadFeatures, HeadObjective, logits

SCALE = 1000  # scores are held as whole thousandths
CLOSE = 0.5  # a score so near to the right one counts as right, in the accuracy


@dataclasses.dataclass(frozen=True)
class SequenceClassification(HeadObjective):
    """START text eos, or START first eos second eos; the head is read at one position.

    START is the vocabulary's bos, or its pad where there is none. (BERT's [CLS] and [SEP] are what
    an imported tokenizer calls bos and eos; both texts have token type 0.) With one class the
    label is a score: the loss is its squared error, "accuracy" the share of scores that are within
    0.5 of the right one, the baseline the variance of the right ones.
    """

    # which position: the first, or the last, where a decoder has read everything
    pool: Literal["first", "last"] = "first"

    def __post_init__(self):
        super().__post_init__()
        if self.pool not in ("first", "last"):
            raise ConfigError("pool", f"{self.pool!r} is neither first nor last")

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("classes" if self.classes > 1 else "score",)

    def build(self, vocabulary: Vocabulary, *, length: int, target_length: int | None) -> Features:
        return self.bound(SequenceFeatures(self, vocabulary, length), target_length)

    def baseline(self, targets: np.ndarray) -> float | None:
        if self.classes > 1 or not len(targets):
            return None
        return float(np.var(targets / SCALE))

    def check(self, source: Source, model: Any) -> None:
        super().check(source, model)
        if model.kind == "decoder" and self.pool == "first":
            raise ConfigError("objective.pool", "a decoder has read nothing there; give 'last'")

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        if self.classes > 1:
            return super().loss(model, batch, key)
        weights_BT = batch["weights"].astype(jnp.float32)
        error_BT = logits(model, batch, key)[..., 0] - batch["targets"] / SCALE
        loss_BT, count = jnp.square(error_BT), weights_BT.sum()
        close = jnp.sum(weights_BT * (jnp.abs(error_BT) <= CLOSE))
        tokens = jax.lax.stop_gradient(loss_BT), weights_BT
        return Loss(jnp.sum(weights_BT * loss_BT), count, {"accuracy": (close, count)}, tokens)

    def predictions(self, answers: Any, cases: Cases) -> list[Any]:
        """The class of each case, or its score."""
        found = answers.arrays(self._said, cases)
        return [float(x[0]) if self.classes == 1 else int(x.argmax()) for x in found]

    def _said(self, model: Any, batch: Batch) -> jax.Array:
        """float32 [B, C]: the logits of each row's case."""
        weights_BT1 = batch["weights"][..., None] > 0
        return jnp.sum(jnp.where(weights_BT1, logits(model, batch), 0.0), 1)[:, : self.classes]


class SequenceFeatures(HeadFeatures):
    def __init__(self, config: SequenceClassification, vocabulary: Vocabulary, length: int):
        self.config = config
        super().__init__(vocabulary, length)

    def ids(self, case: Case, tokenizer: Any) -> np.ndarray:
        label = case.label if self.config.classes > 1 else round(SCALE * case.label)
        if not 0 <= label < (self.config.classes if self.config.classes > 1 else np.inf):
            raise ConfigError(
                "classes", f"{self.config.classes} classes, and a case has label {case.label}"
            )
        texts = [tokenizer.encode(text) for text in case.texts]
        return np.append(label, self.read(*texts))

    def label(self, beside: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
        at = 0 if self.config.pool == "first" else -1
        targets[at], weights[at] = beside[0], 1
