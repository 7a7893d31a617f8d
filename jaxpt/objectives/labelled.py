"""What objectives share that learn from labelled cases.

Host half: a case is an example, and has a row of its own. Its raw tokens are the numbers that an
example is made of: what is read, and beside it the label. What is too long is cut where it is
encoded, or (``SpanAnswer``) becomes several examples, each but the last of ``most`` raw tokens.

Device half of those with a head of classes (``jaxpt/models/headed.py``): cross-entropy of the
classes where there is a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data.labelled import Case, Cases
from jaxpt.data.packing import Packer
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError, DataError
from jaxpt.objectives.base import Batch, Example, Features, Loss, Objective
from jaxpt.objectives.figures import figures
from jaxpt.objectives.lengths import Lengths


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes raw tokens of cases; what the loader asks in the place of a tokenizer."""

    features: CaseFeatures
    tokenizer: Any

    def encode(self, case: Case) -> np.ndarray:
        if not isinstance(case, Case):
            raise DataError(f"a labelled case is wanted, and the source gave {type(case).__name__}")
        try:
            ids = self.features.ids(case, self.tokenizer)
            if len(ids) and np.abs(ids).max() > np.iinfo(np.int32).max:
                raise ValueError("a number that is too large")
        except (ConfigError, DataError):
            raise
        except (TypeError, ValueError, OverflowError) as error:  # a label is not what it should be
            raise DataError(f"a case of label {case.label!r} cannot be learnt: {error}") from error
        return ids.astype(np.int32)


class CaseFeatures(Features):
    """The host half over cases; subclasses say what an example is."""

    def __init__(self, vocabulary: Vocabulary, length: int, target_length: int | None = None):
        self.vocabulary, self.length, self.target_length = vocabulary, length, target_length
        self.start = vocabulary.pad if vocabulary.bos is None else vocabulary.bos
        self.lengths = (self.count(0, self.most),)

    @property
    def most(self) -> int:
        """Raw tokens of the longest example."""
        raise NotImplementedError

    def ids(self, case: Case, tokenizer: Any) -> np.ndarray:
        """The raw tokens of a case, int [n]; those after ``most`` are another example's."""
        raise NotImplementedError

    def encoder(self, tokenizer: Any) -> Encoder:
        return Encoder(self, tokenizer)

    def examples(self, case: Case, tokenizer: Any) -> list[Example]:
        """All that are made of a case: one, but where a text is read in windows."""
        ids, rng = self.encoder(tokenizer).encode(case), np.random.default_rng(0)
        starts = range(0, len(ids), self.most)
        return [self.example(ids[at : at + self.most], 0, rng) for at in starts]

    def request(self, rng: np.random.Generator, step: int = 0) -> tuple[int, int]:
        return 0, self.lengths[0].raw

    def count(self, task: int, n: int) -> Lengths:
        # A case is never cut: all that fit count as the longest, whatever they come to.
        over = max(0, n - self.most)
        if self.target_length is None:
            return Lengths(n, 0, min(n, self.length) + over)
        return Lengths(n, min(n, self.length) + over, min(n, self.target_length) + over)

    def packer(self, plain: Packer) -> Packer:
        return dataclasses.replace(plain, pack=False)


class HeadFeatures(CaseFeatures):
    """Of objectives with a head: ``beside`` numbers of the label, then what is read."""

    beside = 1

    @property
    def most(self) -> int:
        return self.beside + self.length

    def text(self, example: Example) -> np.ndarray:
        return example["tokens"]

    def read(self, first: np.ndarray, second: np.ndarray | None = None) -> np.ndarray:
        """START first eos (second eos); the longer of two loses its end until both fit."""
        parts = [first] if second is None else [first, second]
        over = 1 + sum(len(part) + 1 for part in parts) - self.length
        while over > 0:
            longer = max(range(len(parts)), key=lambda i: len(parts[i]))
            other = max((len(p) for i, p in enumerate(parts) if i != longer), default=0)
            cut = min(over, max(1, len(parts[longer]) - other))
            parts[longer] = parts[longer][: len(parts[longer]) - cut]
            over -= cut
        eos = self.vocabulary.eos
        return np.concatenate([[self.start], *(np.append(part, eos) for part in parts)])

    def example(
        self, tokens: np.ndarray, task: int, rng: np.random.Generator, step: int = 0
    ) -> Example:
        read = tokens[self.beside :]
        targets, weights = np.zeros(len(read), np.int32), np.zeros(len(read), np.float32)
        self.label(tokens[: self.beside], targets, weights)
        return {"tokens": read, "targets": targets, "weights": weights, "task": task}

    def label(self, beside: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
        """Writes the label into the arrays of the positions."""
        raise NotImplementedError


class Judged:
    """An objective that says what the model answers to cases."""

    labelled = True

    def predictions(self, answers: Any, cases: Cases) -> list[Any]:
        """The model's answer to each case: see ``jaxpt.objectives.figures``."""
        raise NotImplementedError

    def figures(self, answers: Any, cases: Cases) -> dict[str, float]:
        said = self.predictions(answers, cases)
        return figures(cases.metrics, said, list(cases), cases.labels)


@dataclasses.dataclass(frozen=True)
class HeadObjective(Judged, Objective):
    """An objective of one component over a head of ``classes``."""

    classes: int = 2  # classes to tell apart, as many as the model's head has

    def __post_init__(self):
        if self.classes < 1:
            raise ConfigError("classes", f"{self.classes} is not valid; give 1 or more")

    @property
    def in_place(self) -> bool:
        return True  # no target is among the tokens

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("classes",)

    def only(self, task: int) -> Objective:
        if task != 0:
            raise IndexError(f"{type(self).__name__} has one component, not {task + 1}")
        return self

    def bound(self, features: CaseFeatures, target_length: int | None) -> Features:
        """The host half, with what it asks of the model."""
        if target_length is not None:
            raise ConfigError("target_length", "a head of classes has one stream; leave it None")
        features.needs = {"classes": self.classes}
        return features

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        """Cross-entropy of ``targets`` where there is a ``weight``, in nats; "accuracy"."""
        logits_BTC, weights_BT = logits(model, batch, key), batch["weights"].astype(jnp.float32)
        log_probs_BTC = jax.nn.log_softmax(logits_BTC[..., : self.classes])
        # Padding is the pad id, which need not be a class; where no weight is, nothing is meant.
        targets_BT = jnp.where(weights_BT > 0, batch["targets"], 0)
        loss_BT = -jnp.take_along_axis(log_probs_BTC, targets_BT[..., None], axis=-1)[..., 0]
        right_BT = jnp.argmax(log_probs_BTC, axis=-1) == targets_BT
        count = weights_BT.sum()
        metrics = {"accuracy": (jnp.sum(weights_BT * right_BT), count)}
        tokens = jax.lax.stop_gradient(loss_BT), weights_BT
        return Loss(jnp.sum(weights_BT * loss_BT), count, metrics, tokens)


def logits(model: Any, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """The head's, float32 [B, T, C]."""
    keys = (None, None) if key is None else jax.random.split(key)
    return model.classes(model(batch, key=keys[0]), keys[1])


def words(texts: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    """The ids of each of several words, as they are within a text."""
    return [tokenizer.encode(f" {word}" if i else word) for i, word in enumerate(texts)]
