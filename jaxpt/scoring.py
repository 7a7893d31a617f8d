"""How likely a model finds given answers: log-probabilities, and greedy text up to a stop string.

Questions are batched with others of about their length: rows are padded to a power of two, so that
a program compiles once for a bucket and a question's score does not depend on what else is in its
batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError
from jaxpt.generator import Generator, bucket
from jaxpt.mesh import Layout
from jaxpt.models.model import Model
from jaxpt.objectives.prompt import Prompt
from jaxpt.sampling import GREEDY, Sampling
from jaxpt.state import Params

LOGITS = 1 << 25  # so many are made at a time
SHORTEST = 4  # bucket of answers
FIRST_ROUND = 64  # tokens that are written before it is seen who is done
Sizes = tuple[int, int, int]  # positions of the decoder, of the encoder (0: none), of the answer


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model reads, and the answer (int32 [n], n >= 1) that might follow at once."""

    prompt: Prompt
    answer: np.ndarray


@dataclasses.dataclass(frozen=True)
class Score:
    """log_prob: of the answer's tokens, in nats, without an end. greedy: whether each of them is
    the likeliest at its place."""

    log_prob: float
    greedy: bool


class Scorer:
    """Scores answers with a model and its parameters on a layout.

    >>> scorer = Scorer(model, params, tokenizer.vocabulary, layout)
    >>> scorer([Question(Prompt(ids), answer)])[0].log_prob

    Args:
      batch: questions that are scored at a time.

    Raises:
      ConfigError: a model that writes no text.
    """

    def __init__(
        self, model: Model, params: Params, vocabulary: Vocabulary, layout: Layout, batch: int = 16
    ):
        if "tokens" not in model.config.outputs or model.config.kind == "encoder":
            raise ConfigError(
                "model", f"{type(model.config).__name__} writes no text, so it scores none"
            )
        if batch < 1:
            raise ConfigError("batch", f"{batch} is not valid; give 1 or more")
        self.model, self.params, self.layout = model, params, layout
        self.pad = vocabulary.pad
        self.rows = -(-batch // layout.ways("batch")) * layout.ways("batch")
        # Whole on every device: each of several processes reads the result.
        self._score = jax.jit(self._score_rows, out_shardings=layout.sharding(()))

    def __call__(self, questions: Sequence[Question]) -> list[Score]:
        """The score of each question.

        Raises:
          ConfigError: more positions than the model has.
        """
        groups: dict[Sizes, list[int]] = {}
        for i, question in enumerate(questions):
            groups.setdefault(self._sizes(question), []).append(i)
        pending = []
        for sizes in sorted(groups, reverse=True):  # what does not fit in memory comes first
            for start in range(0, len(groups[sizes]), self.rows):
                chosen = groups[sizes][start : start + self.rows]
                batch = self._batch([questions[i] for i in chosen], sizes)
                with self.layout.active():
                    pending.append((chosen, self._score(self.params, batch)))
        scores: dict[int, Score] = {}
        for chosen, found in pending:
            log_probs_B, greedy_B = map(np.asarray, found)
            for i, log_prob, greedy in zip(chosen, log_probs_B, greedy_B, strict=False):
                scores[i] = Score(float(log_prob), bool(greedy))
        return [scores[i] for i in range(len(questions))]

    def _sizes(self, question: Question) -> Sizes:
        """The bucket of a question."""
        answer, inputs = len(question.answer), question.prompt.inputs
        if not answer:
            raise ValueError("an answer has at least one token")
        tokens = len(question.prompt.tokens) + answer - 1
        read = 0 if inputs is None else len(inputs)
        table = self.model.config.max_length
        if table is not None and max(tokens, read) > table:
            raise ConfigError(
                "prompt", f"{max(tokens, read)} tokens are beyond the model's {table} positions"
            )
        ways = self.layout.ways("length")
        decoder, encoder = (-(-bucket(n) // ways) * ways for n in (tokens, read))
        return decoder, encoder if read else 0, bucket(answer, SHORTEST)

    def _batch(self, questions: Sequence[Question], sizes: Sizes) -> dict[str, np.ndarray]:
        """Arrays [rows, positions]; rows to spare repeat the first question.

        ``at`` is where each token of the answer is predicted, ``answers`` the token, -1 for none.
        """
        T, S, A = sizes
        B = self.rows
        batch = {name: np.zeros((B, T), np.int32) for name in ("segments", "positions", "prefix")}
        batch["tokens"] = np.full((B, T), self.pad, np.int32)
        batch["at"], batch["answers"] = np.zeros((B, A), np.int32), np.full((B, A), -1, np.int32)
        if any(question.prompt.blank is not None for question in questions):
            batch["inner_positions"] = np.zeros((B, T), np.int32)
        if S:
            batch["inputs"] = np.full((B, S), self.pad, np.int32)
            batch |= {f"input_{n}": np.zeros((B, S), np.int32) for n in ("segments", "positions")}
        for row in range(B):
            question = questions[row if row < len(questions) else 0]
            self._fill({name: x[row] for name, x in batch.items()}, question)
        return batch

    def _fill(self, row: dict[str, np.ndarray], question: Question) -> None:
        """Lays one question in the arrays of a row."""
        prompt, answer = question.prompt, question.answer
        read = len(prompt.tokens)
        n = read + len(answer) - 1
        row["tokens"][:n] = np.concatenate([prompt.tokens, answer[:-1]])
        row["segments"][:n], row["positions"][:n] = 1, np.arange(n)
        row["prefix"][: read - prompt.given] = prompt.prefix
        row["at"][: len(answer)] = np.arange(read - 1, n)
        row["answers"][: len(answer)] = answer
        if prompt.blank is not None:  # its start and what follows stand at the blank
            most = getattr(self.model.config, "inner_positions", 0) - 1
            row["positions"][read - 1 : n], row["prefix"][read - 1] = prompt.blank, 0
            row["inner_positions"][read - 1 : n] = np.minimum(1 + np.arange(n - read + 1), most)
        if prompt.inputs is not None:
            m = len(prompt.inputs)
            row["inputs"][:m] = prompt.inputs
            row["input_segments"][:m], row["input_positions"][:m] = 1, np.arange(m)

    def _score_rows(self, params: Params, batch: dict[str, jax.Array]):
        """(log-probabilities float32 [B], whether all are greedy bool [B]).

        Logits are made of the answers' places alone, some of them at a time.
        """
        at_BA, answers_BA = batch.pop("at"), batch.pop("answers")
        network = self.model.bind(params)
        x_BAD = jnp.take_along_axis(network(batch), at_BA[..., None], axis=1)
        B, A = at_BA.shape
        C = A
        while C > 1 and B * C * self.model.vocab_size > LOGITS:
            C //= 2

        def part(xs):
            x_BCD, answers_BC = xs
            logits_BCV = network.logits(x_BCD)
            log_probs_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
            picked = jnp.maximum(answers_BC, 0)[..., None]
            gained_BC = jnp.take_along_axis(log_probs_BCV, picked, axis=-1)[..., 0]
            right_BC = jnp.argmax(logits_BCV, axis=-1) == answers_BC
            real_BC = answers_BC >= 0
            return jnp.where(real_BC, gained_BC, 0.0).sum(1), (right_BC | ~real_BC).all(1)

        parts = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(B, A // C, C, *a.shape[2:]), 1, 0), (x_BAD, answers_BA)
        )
        log_probs, greedy = jax.lax.map(part, parts)
        return log_probs.sum(0), greedy.all(0)


def windows(ids: np.ndarray, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stretches that predict every one of ``ids`` once, with as much context as there is room for.

    Args:
      ids: int32 [n], n >= 1.
      most: positions, of what is read and of what is predicted.

    Returns:
      (context, answer) pairs. The first has no context: a start of the model's own stands there.
      The answers one after the other are ``ids``; context and answer overlap nowhere, and together
      take most + 1 at most.
    """
    if most < 1:
        raise ConfigError("max_length", f"{most} is not valid; give 1 or more")
    found = [(ids[:0], ids[:most])]
    for start in range(most, len(ids), most):
        end = min(start + most, len(ids))
        found.append((ids[max(0, end - most - 1) : start], ids[start:end]))
    return found


def write(
    generator: Generator,
    prompts: Sequence[Prompt],
    decode: Callable[[np.ndarray], str],
    *,
    until: Sequence[str] = (),
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch: int = 16,
) -> list[str]:
    """What the model writes after each prompt, up to the first of the strings ``until``.

    A few tokens are written first; those who neither ended nor came to a stop string are asked
    again for more, which begins with the same tokens.

    Args:
      decode: ids -> text.
      until: stop strings; they are not part of the text.
      max_tokens: the most tokens of each text.
      sampling, seed: how tokens are drawn; a text depends on its number among the prompts.
      batch: prompts at a time.
    """
    texts: dict[int, str] = {}
    left = sorted(range(len(prompts)), key=lambda i: -_length(prompts[i]))
    most = min(max_tokens, FIRST_ROUND)
    while left:
        again = []
        for start in range(0, len(left), batch):
            chosen = left[start : start + batch]
            written = generator.sample(
                [prompts[i] for i in chosen],
                max_tokens=most,
                sampling=sampling,
                seed=seed,
                numbers=chosen,
            )
            for i, found in zip(chosen, written, strict=True):
                text = decode(found.tokens)
                texts[i] = cut(text, until)
                if not found.ended and texts[i] == text and most < max_tokens:
                    again.append(i)
        left, most = again, min(max_tokens, 4 * most)
    return [texts[i] for i in range(len(prompts))]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings; empty ones do not count."""
    ends = [at for stop in until if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _length(prompt: Prompt) -> int:
    return len(prompt.tokens) + (0 if prompt.inputs is None else len(prompt.inputs))
