"""A question, a text, and where the answer stands in it (Devlin et al. 2019, section 4.2)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data.labelled import Case, Cases
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError
from jaxpt.objectives.base import Batch, Example, Features, Loss
from jaxpt.objectives.labelled import HeadFeatures, HeadObjective, logits, words


@dataclasses.dataclass(frozen=True)
class SpanAnswer(HeadObjective):
    """START question eos text eos; class 0 is the answer's first token, class 1 its last.

    Each is a softmax over the text's positions and the first, which stands for "no answer". The
    loss is the mean of both cross-entropies. Answers are made of whole words: what stands between
    white space. A text that is too long loses its end, and an answer there is none.

    The baseline counts the places of answers' first tokens.
    """

    longest: int = 30  # tokens of the longest answer that is given

    def __post_init__(self):
        super().__post_init__()
        if self.classes != 2:
            raise ConfigError("classes", f"{self.classes} is not valid: 2, beginning and end")
        if self.longest < 1:
            raise ConfigError("longest", f"{self.longest} is not valid; give 1 or more")

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("span",)

    def build(self, vocabulary: Vocabulary, *, length: int, target_length: int | None) -> Features:
        return self.bound(SpanFeatures(vocabulary, length), target_length)

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        log_probs_BT2 = jax.nn.log_softmax(_masked(logits(model, batch, key), batch), axis=1)
        rows_B = batch["weights"][:, 0].astype(jnp.float32)  # 0 in rows of padding
        places_B2 = jnp.stack([batch["targets"][:, 0], batch["ends"][:, 0]], 1)
        places_B2 = jnp.where(rows_B[:, None] > 0, places_B2, 0)
        picked_B2 = jnp.take_along_axis(log_probs_BT2, places_B2[:, None], axis=1)[:, 0]
        right_B = (jnp.argmax(log_probs_BT2, axis=1) == places_B2).all(-1)
        # Rows of padding have no text: their softmax is over the first position alone.
        loss_B = -picked_B2.mean(-1)
        total, count = jnp.sum(jnp.where(rows_B > 0, loss_B, 0.0)), rows_B.sum()
        return Loss(total, count, {"accuracy": (jnp.sum(rows_B * right_B), count)})

    def predictions(self, answers: Any, cases: Cases) -> list[Any]:
        """The text of each answer; "" for none."""
        found = answers.arrays(self._said, cases)
        said = []
        for (first, last), case in zip(found, cases, strict=True):
            _, owners, spans = answers.features.laid_out(case, answers.tokenizer)
            inside = first and owners[first] >= 0 and owners[last] >= 0
            text = case.texts[1]
            said.append(text[spans[owners[first]][0] : spans[owners[last]][1]] if inside else "")
        return said

    def _said(self, model: Any, batch: Batch) -> jax.Array:
        """int32 [B, 2]: first and last position of the likeliest answer."""
        log_probs_BT2 = jax.nn.log_softmax(_masked(logits(model, batch), batch), axis=1)
        T = log_probs_BT2.shape[1]
        scores_BTT = log_probs_BT2[:, :, None, 0] + log_probs_BT2[:, None, :, 1]
        places_T = jnp.arange(T)
        length_TT = places_T[None] - places_T[:, None] + 1
        fits_TT = (length_TT >= 1) & (length_TT <= self.longest)
        fits_TT &= (places_T[:, None] > 0) | (places_T[None] == 0)  # no answer begins at "none"
        best_B = jnp.argmax(jnp.where(fits_TT, scores_BTT, -jnp.inf).reshape(-1, T * T), axis=1)
        return jnp.stack([best_B // T, best_B % T], 1)


def _masked(logits_BTC: jax.Array, batch: Batch) -> jax.Array:
    """float32 [B, T, 2]: -inf where no answer can stand."""
    T = logits_BTC.shape[1]
    index_T, first_B1 = jnp.arange(T), batch["ends"][:, 1:2]
    real_BT = (batch["segments"] != 0) & (index_T >= first_B1) & (first_B1 > 0)
    last_B1 = jnp.sum(batch["segments"] != 0, axis=1, keepdims=True) - 1  # the eos
    allowed_BT = (real_BT & (index_T < last_B1)) | (index_T == 0)
    return jnp.where(allowed_BT[..., None], logits_BTC[..., :2], -jnp.inf)


class SpanFeatures(HeadFeatures):
    """Raw tokens: first and last position of the answer, the text's first, what is read.

    Examples have ``ends``: at position 0 the answer's last, at 1 the text's first.
    """

    beside = 3
    extra = ("ends",)

    def laid_out(
        self, case: Case, tokenizer: Any
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """(what is read; the word of the text that each position is of, or -1; each word's first
        character and one past its last)."""
        question, text = case.texts
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        each = words([text[a:b] for a, b in spans], tokenizer)
        # At least half of the row is the text's.
        asked = tokenizer.encode(question)[: max(1, self.length // 2 - 2)]
        room = self.length - len(asked) - 3
        ids = np.concatenate([*each, np.zeros(0, np.int32)])[:room]
        owners = np.repeat(np.arange(len(each)), [len(word) for word in each])[:room]
        eos, first = self.vocabulary.eos, len(asked) + 2
        read = np.concatenate([[self.start], asked, [eos], ids, [eos]])
        none = np.full(first, -1)
        return read, np.concatenate([none, owners, [-1]]), spans

    def ids(self, case: Case, tokenizer: Any) -> np.ndarray:
        read, owners, spans = self.laid_out(case, tokenizer)
        text = int(np.argmax(owners >= 0)) if (owners >= 0).any() else 0
        begin, end = case.label
        held = [i for i, (a, b) in enumerate(spans) if a < end and b > begin]
        places = np.flatnonzero(np.isin(owners, held))
        # An answer that is cut off, wholly or in part, is none.
        whole = len(places) and owners[places[-1]] == held[-1]
        first, last = (places[0], places[-1]) if whole else (0, 0)
        return np.concatenate([[first, last, text], read])

    def example(
        self, tokens: np.ndarray, task: int, rng: np.random.Generator, step: int = 0
    ) -> Example:
        example = super().example(tokens, task, rng, step)
        ends = np.zeros(len(example["tokens"]), np.int32)
        ends[:2] = tokens[1:3]
        return example | {"ends": ends}

    def label(self, beside: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
        targets[0], weights[0] = beside[0], 1
