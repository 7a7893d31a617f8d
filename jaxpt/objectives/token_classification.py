"""Words, and the class of each (Devlin et al. 2019, section 5.3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data.labelled import Case, Cases
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.objectives.base import Batch, Example, Features
from jaxpt.objectives.labelled import CaseFeatures, HeadObjective, logits, words


@dataclasses.dataclass(frozen=True)
class TokenClassification(HeadObjective):
    """START words eos; a word's class is read and learnt at its first token, at the others nothing.

    Words that a row has no room for are left out, and count as class 0 where they are judged.
    """

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("tags",)

    def build(self, vocabulary: Vocabulary, *, length: int, target_length: int | None) -> Features:
        return self.bound(TagFeatures(vocabulary, length), target_length)

    def predictions(self, answers: Any, cases: Cases) -> list[Any]:
        """The classes of each case's words."""
        found = answers.arrays(self._said, cases)
        said = []
        for tags_T, case in zip(found, cases, strict=True):
            tags = tags_T[tags_T >= 0].tolist()
            said.append(tuple(tags + [0] * (len(case.texts) - len(tags))))
        return said

    def _said(self, model: Any, batch: Batch) -> jax.Array:
        """int32 [B, T]: the class at each word's first token, -1 elsewhere."""
        best_BT = jnp.argmax(logits(model, batch)[..., : self.classes], axis=-1)
        return jnp.where(batch["weights"] > 0, best_BT, -1)


class TagFeatures(CaseFeatures):
    """Raw tokens: what is read, then as many labels, class + 1, 0 where there is none."""

    @property
    def most(self) -> int:
        return 2 * self.length

    def ids(self, case: Case, tokenizer: Any) -> np.ndarray:
        read, labels = [np.array([self.start])], [np.zeros(1, int)]
        room = self.length - 2
        for ids, tag in zip(words(case.texts, tokenizer), case.label, strict=True):
            if len(ids) > room:
                break
            room -= len(ids)
            read.append(ids)
            labels.append(np.append(tag + 1, np.zeros(len(ids) - 1, int)))
        end = np.array([self.vocabulary.eos])
        return np.concatenate([*read, end, *labels, np.zeros(1, int)])

    def example(
        self, tokens: np.ndarray, task: int, rng: np.random.Generator, step: int = 0
    ) -> Example:
        read, labels = np.split(tokens, 2)
        return {
            "tokens": read,
            "targets": np.maximum(labels - 1, 0),
            "weights": (labels > 0).astype(np.float32),
            "task": task,
        }

    def text(self, example: Example) -> np.ndarray:
        return example["tokens"]
