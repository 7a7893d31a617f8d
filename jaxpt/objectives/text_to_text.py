"""A text in, a text out (Raffel et al. 2020, section 2.4): fine-tuning without a head."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxpt.data.labelled import Case, Cases
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError
from jaxpt.objectives.base import Example, Features
from jaxpt.objectives.denoiser import Denoiser
from jaxpt.objectives.labelled import CaseFeatures, Judged
from jaxpt.objectives.prompt import Prompt, form


@dataclasses.dataclass(frozen=True)
class TextToText(Judged, Denoiser):
    """I is a case's text and T what is to be written; the target's end is learnt too.

    Encoder-decoder: as denoisers (``denoiser.py``), M the mode's ids.

        inputs   M I eos
        tokens   pad t1 t2 ... tk          targets  t1 t2 t3 ... eos

    One stream: x = START M I T eos, weights 1 on T and its eos; START is left out with ``prefix``,
    and what stands before T then sees both ways.

    What is too long is cut: the target first, if it leaves no room, then the inputs' end.
    """

    _: dataclasses.KW_ONLY
    prefix: bool = False  # in one stream, whether the inputs see one another both ways
    longest: int = 32  # tokens of the longest answer that is written when it is judged

    def __post_init__(self):
        super().__post_init__()
        if self.longest < 1:
            raise ConfigError("longest", f"{self.longest} is not valid; give 1 or more")

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("text",)

    def build(self, vocabulary: Vocabulary, *, length: int, target_length: int | None) -> Features:
        return TextFeatures(self, vocabulary, length, target_length)

    def predictions(self, answers: Any, cases: Cases) -> list[Any]:
        """The text that is written for each case; where there are classes, the class with that word
        (-1: none), and where there are scores, the number (-1: none)."""
        features, tokenizer = answers.features, answers.tokenizer
        two_streams = features.target_length is not None
        asked = []
        for case in cases:
            ids, _ = features.parts(case, tokenizer, room=self.longest)
            asked.append(form(self, tokenizer.vocabulary, ids, two_streams))
        return [
            self._read(text.strip(), case, cases.labels)
            for text, case in zip(answers.texts(asked, self.longest), cases, strict=True)
        ]

    def _read(self, text: str, case: Case, labels: tuple[str, ...]) -> Any:
        if labels:
            return labels.index(text) if text in labels else -1
        if not isinstance(case.label, float):
            return text
        try:
            return float(text)
        except ValueError:
            return -1.0


@form.register
def _(objective: TextToText, vocabulary: Vocabulary, ids: np.ndarray, two_streams: bool) -> Prompt:
    opened = np.array([*objective.mode_ids(vocabulary), *ids], np.int32)
    if two_streams:
        inputs = np.append(opened, np.int32(vocabulary.eos))
        return Prompt(np.array([vocabulary.pad], np.int32), inputs, text=ids)
    if objective.prefix:
        return Prompt(opened, prefix=True, text=ids)
    start = vocabulary.pad if vocabulary.bos is None else vocabulary.bos
    return Prompt(np.array([start, *opened], np.int32), text=ids)


class TextFeatures(CaseFeatures):
    """Raw tokens: the number of I, then I and T."""

    def __init__(
        self, config: TextToText, vocabulary: Vocabulary, length: int, target_length: int | None
    ):
        self.config, self.mode = config, np.array(config.mode_ids(vocabulary), np.int32)
        super().__init__(vocabulary, length, target_length)
        self.opening = len(self.mode) + (not config.prefix and target_length is None)
        if length < self.opening + 3:
            raise ConfigError("length", f"{length} is too short for an input and a target")

    @property
    def most(self) -> int:
        return 1 + self.length + (self.target_length or 0)

    def parts(
        self, case: Case, tokenizer: Any, room: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(I, T), cut so that they fit; or I so that ``room`` tokens fit after it."""
        inputs = tokenizer.encode(" ".join(case.texts))
        target = tokenizer.encode(case.target)
        if self.target_length is not None:
            # An end stands after each.
            return inputs[: self.length - self.opening - 1], target[: self.target_length - 1]
        target = target[: self.length - self.opening - 1]
        after = len(target) if room is None else room
        return inputs[: max(1, self.length - self.opening - after)], target

    def ids(self, case: Case, tokenizer: Any) -> np.ndarray:
        inputs, target = self.parts(case, tokenizer)
        return np.concatenate([[len(inputs)], inputs, target])

    def example(
        self, tokens: np.ndarray, task: int, rng: np.random.Generator, step: int = 0
    ) -> Example:
        at = 1 + tokens[0]
        inputs, target = tokens[1:at], tokens[at:]
        eos = self.vocabulary.eos
        ended = np.append(target, eos).astype(np.int32)
        if self.target_length is not None:
            return {
                "inputs": np.concatenate([self.mode, inputs, [eos]]).astype(np.int32),
                "tokens": np.concatenate([[self.vocabulary.pad], target]).astype(np.int32),
                "targets": ended,
                "weights": np.ones(len(ended), np.float32),
                "task": task,
            }
        start = [] if self.config.prefix else [self.start]
        before = np.concatenate([start, self.mode, inputs]).astype(np.int32)
        stream = np.concatenate([before, ended])
        n = len(before)
        weights = (np.arange(len(stream) - 1) >= n - 1).astype(np.float32)
        prefix = (np.arange(len(stream) - 1) < n).astype(np.int32) * self.config.prefix
        return {
            "tokens": stream[:-1],
            "targets": stream[1:],
            "weights": weights,
            "prefix": prefix,
            "task": task,
        }

    def text(self, example: Example) -> np.ndarray:
        if self.target_length is not None:
            n = len(example["inputs"]) - len(self.mode) - 1
            inputs, target = example["inputs"][len(self.mode) : -1], example["targets"][:-1]
        else:
            first = int(np.argmax(example["weights"] > 0))
            inputs = example["tokens"][self.opening : first + 1]
            n, target = len(inputs), example["targets"][first:-1]
        return np.concatenate([[n], inputs, target]).astype(np.int32)
