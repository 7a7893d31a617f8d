"""A question, a text, and where the answer stands in it (Devlin et al. 2019, section 4.2)."""

from __future__ import annotations

import dataclasses
import itertools
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

SHORTEST = 8  # positions of a row that has something of both texts


@dataclasses.dataclass(frozen=True)
class SpanAnswer(HeadObjective):
    """START question eos text eos; class 0 is the answer's first token, class 1 its last.

    Each is a softmax over the text's positions and the first, which stands for "no answer". The
    loss is the mean of both cross-entropies. Answers are made of whole words: what stands between
    white space.

    A text that is too long is read in windows, which begin ``stride`` tokens apart (BERT's
    run_squad). In training each is an example of its own; one that has not all of the answer has
    none. A case is answered with the likeliest answer of all windows, by the sum of its two logits,
    unless in every window "no answer" has a greater one.

    The baseline counts the places of answers' first tokens.
    """

    longest: int = 30  # tokens of the longest answer that is given
    # tokens from one window of a long text to the next; at most as many as a window has
    stride: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.classes != 2:
            raise ConfigError("classes", f"{self.classes} is not valid: 2, beginning and end")
        if self.longest < 1:
            raise ConfigError("longest", f"{self.longest} is not valid; give 1 or more")
        if self.stride < 1:
            raise ConfigError("stride", f"{self.stride} is not valid; give 1 or more")

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("span",)

    def build(self, vocabulary: Vocabulary, *, length: int, target_length: int | None) -> Features:
        if length < SHORTEST:
            raise ConfigError("length", f"{length} is too short; give {SHORTEST} or more")
        return self.bound(SpanFeatures(self, vocabulary, length), target_length)

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
        found = answers.pieces(self._said, cases)
        said = []
        for rows, case in zip(found, cases, strict=True):
            windows, spans = answers.features.windows(case, answers.tokenizer)
            none = min(row[3] for row in rows)
            (first, last, score, _), (_, owners) = max(
                zip(rows, windows, strict=True), key=lambda pair: pair[0][2]
            )
            text, inside = case.texts[1], score > none
            ends = owners[int(first)], owners[int(last)]
            said.append(text[spans[ends[0]][0] : spans[ends[1]][1]] if inside else "")
        return said

    def _said(self, model: Any, batch: Batch) -> jax.Array:
        """float32 [B, 4]: first and last position of the likeliest answer, the sum of its logits
        (-inf where there can be none), that of "no answer"."""
        logits_BT2 = _masked(logits(model, batch), batch)
        T = logits_BT2.shape[1]
        scores_BTT = logits_BT2[:, :, None, 0] + logits_BT2[:, None, :, 1]
        places_T = jnp.arange(T)
        length_TT = places_T[None] - places_T[:, None] + 1
        fits_TT = (length_TT >= 1) & (length_TT <= self.longest)
        fits_TT &= places_T[:, None] > 0  # no answer begins at "none"
        flat_BS = jnp.where(fits_TT, scores_BTT, -jnp.inf).reshape(-1, T * T)
        best_B = jnp.argmax(flat_BS, axis=1)
        return jnp.stack([best_B // T, best_B % T, flat_BS.max(1), scores_BTT[:, 0, 0]], 1)


def _masked(logits_BTC: jax.Array, batch: Batch) -> jax.Array:
    """float32 [B, T, 2]: -inf where no answer can stand."""
    T = logits_BTC.shape[1]
    index_T, first_B1 = jnp.arange(T), batch["ends"][:, 1:2]
    real_BT = (batch["segments"] != 0) & (index_T >= first_B1) & (first_B1 > 0)
    last_B1 = jnp.sum(batch["segments"] != 0, axis=1, keepdims=True) - 1  # the eos
    allowed_BT = (real_BT & (index_T < last_B1)) | (index_T == 0)
    return jnp.where(allowed_BT[..., None], logits_BTC[..., :2], -jnp.inf)


Window = tuple[np.ndarray, np.ndarray]  # what is read; the text's word at each position, or -1


class SpanFeatures(HeadFeatures):
    """Raw tokens of each window: first and last position of the answer, the text's first, what is
    read. All windows but a case's last are full, so that they are cut where they end.

    Examples have ``ends``: at position 0 the answer's last, at 1 the text's first.
    """

    beside = 3
    extra = ("ends",)

    def __init__(self, config: SpanAnswer, vocabulary: Vocabulary, length: int):
        self.stride = config.stride
        super().__init__(vocabulary, length)

    def windows(self, case: Case, tokenizer: Any) -> tuple[list[Window], list[tuple[int, int]]]:
        """(The windows, one or more; each word's first character and one past its last)."""
        windows, _, spans = self._laid_out(case, tokenizer)
        return windows, spans

    def ids(self, case: Case, tokenizer: Any) -> np.ndarray:
        windows, owners, spans = self._laid_out(case, tokenizer)
        begin, end = case.label
        held = [i for i, (a, b) in enumerate(spans) if a < end and b > begin]
        sizes = [int((owners == i).sum()) for i in held]
        found: list[np.ndarray] = []
        for read, inside in windows:
            text = int(np.argmax(inside >= 0)) if (inside >= 0).any() else 0
            places = np.flatnonzero(np.isin(inside, held))
            # An answer that is cut off, wholly or in part, is none.
            whole = len(places) > 0 and len(places) == sum(sizes)
            first, last = (places[0], places[-1]) if whole else (0, 0)
            found.append(np.concatenate([[first, last, text], read]))
        return np.concatenate(found)

    def _laid_out(
        self, case: Case, tokenizer: Any
    ) -> tuple[list[Window], np.ndarray, list[tuple[int, int]]]:
        """``windows``, with the word of each token of the whole text between them."""
        question, text = case.texts
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        each = words([text[a:b] for a, b in spans], tokenizer)
        # At least half of the row is the text's.
        asked = tokenizer.encode(question)[: max(1, self.length // 2 - 2)]
        room = self.length - len(asked) - 3
        ids = np.concatenate([*each, np.zeros(0, np.int32)])
        owners = np.repeat(np.arange(len(each)), [len(word) for word in each])
        eos, none, windows = self.vocabulary.eos, np.full(len(asked) + 2, -1), []
        for start in itertools.count(0, min(self.stride, room)):
            part, inside = ids[start : start + room], owners[start : start + room]
            read = np.concatenate([[self.start], asked, [eos], part, [eos]])
            windows.append((read, np.concatenate([none, inside, [-1]])))
            if start + room >= len(ids):
                break
        return windows, owners, spans

    def example(
        self, tokens: np.ndarray, task: int, rng: np.random.Generator, step: int = 0
    ) -> Example:
        example = super().example(tokens, task, rng, step)
        ends = np.zeros(len(example["tokens"]), np.int32)
        ends[:2] = tokens[1:3]
        return example | {"ends": ends}

    def label(self, beside: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
        targets[0], weights[0] = beside[0], 1
