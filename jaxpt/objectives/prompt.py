"""From a text that a user gives to what the model of an objective was trained to go on from.

``prompt`` finds the component of the objective that asks this kind of question (fill spans, fill
masks, go on) and lets it put the prompt together. An objective of another form registers its
own in its own file:

    @form.register
    def _(objective: MyObjective, vocabulary, ids, two_streams): return Prompt(...)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError
from jaxpt.objectives.base import Objective
from jaxpt.objectives.blank_infilling import BlankInfilling
from jaxpt.objectives.causal import CausalLM
from jaxpt.objectives.denoiser import Denoiser
from jaxpt.objectives.fill_in_the_middle import Infilling
from jaxpt.objectives.masked import MaskedLM
from jaxpt.objectives.mixture import Mixture
from jaxpt.objectives.span_corruption import SpanCorruption
from jaxpt.objectives.ul2 import UL2


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model reads before it writes; arrays are int32 [n].

    tokens: what the decoder or the only stack reads, at least one; it goes on after the last.
    inputs: what the encoder reads; None where there is none.
    prefix: whether ``tokens`` see one another both ways.
    text: the ids that were asked about, without mode and end: what ``jaxpt.filling.pieces`` takes.
      It may end in a sentinel that the user did not write; None: the tokens.
    holes: positions in ``tokens`` that are to be predicted where they stand, all at once; with
      them nothing is written after the last.
    middle: position in ``text`` that what is written takes the place of; None: it goes after it.
    blank: position in ``tokens`` of the blank that is filled: what is written stands at it, and
      counts its inner positions. The last token is its start, which the others do not see.
    given: tokens at the end that belong to the answer: those before do not see them.
    """

    tokens: np.ndarray
    inputs: np.ndarray | None = None
    prefix: bool = False
    text: np.ndarray | None = None
    holes: np.ndarray | None = None
    middle: int | None = None
    blank: int | None = None
    given: int = 0


def prompt(
    objective: Objective,
    vocabulary: Vocabulary,
    ids: np.ndarray,
    *,
    mode: str | None = None,
    two_streams: bool,
) -> Prompt:
    """The prompt that ``ids`` make.

    Sentinels among the ids ask a component that fills spans, mask ids one that fills masks, and
    others one that goes on. A span filler that is asked by its mode, without a sentinel, gets one
    at the end. With several that fit, the first component counts.

    Args:
      objective: what the model was trained with.
      ids: int32 [n], without mode or eos.
      mode: the mode to announce; None: that of the component.
      two_streams: whether the model is an encoder-decoder.

    Raises:
      ConfigError: no component announces this mode, or none answers such a prompt.
    """
    if not len(ids):
        raise ConfigError("prompt", "it is empty; give a text")
    chosen = _chosen(objective, vocabulary, ids, mode)
    return form(chosen, vocabulary, np.asarray(ids, np.int32), two_streams)


def opening(
    objective: Objective,
    vocabulary: Vocabulary,
    ids: np.ndarray,
    *,
    mode: str | None = None,
    two_streams: bool,
) -> Prompt:
    """The prompt after which the text that follows ``ids`` (int32 [n], n >= 0) comes at once.

    As ``prompt``; but a span filler's first sentinel is written already, so that what comes next is
    text for all.

    Raises:
      ConfigError: no component announces this mode, or the model predicts in place alone.
    """
    chosen = _chosen(objective, vocabulary, ids, mode)
    if isinstance(chosen, MaskedLM):
        raise ConfigError("objective", "the model fills masks; it knows no text that follows")
    start = vocabulary.pad if vocabulary.bos is None else vocabulary.bos
    ids = np.asarray(ids, np.int32)
    if isinstance(chosen, Infilling):
        return Prompt(np.array([start, *ids], np.int32), text=ids)
    asked = form(chosen, vocabulary, ids, two_streams)
    if _fills_spans(chosen):
        tokens = np.array([*asked.tokens, *vocabulary.sentinels[:1]], np.int32)
        return dataclasses.replace(asked, tokens=tokens, given=1)
    if not len(asked.tokens):
        return dataclasses.replace(asked, tokens=np.array([start], np.int32))
    return asked


def _chosen(
    objective: Objective, vocabulary: Vocabulary, ids: np.ndarray, mode: str | None
) -> Objective:
    """The component that ``ids`` and ``mode`` ask."""
    known = list(components(objective))
    announced = list(dict.fromkeys(m for c in known if (m := getattr(c, "mode", None)) is not None))
    if mode is not None:
        if mode not in announced:
            names = ", ".join(announced) or "it was trained without modes"
            raise ConfigError("mode", f"the model knows no mode {mode!r}; known: {names}")
        known = [c for c in known if getattr(c, "mode", None) == mode]
    spans = bool(np.isin(ids, vocabulary.sentinels).any())
    masks = vocabulary.mask is not None and bool((ids == vocabulary.mask).any())
    return max(known, key=lambda c: (_fills_spans(c) == spans) + (_fills_masks(c) == masks))


def components(objective: Objective) -> Iterator[Objective]:
    """The objectives that an objective is made of, mixtures opened."""
    objective = objective.on_host
    if not isinstance(objective, Mixture):
        yield objective
        return
    silent = isinstance(objective, UL2) and not objective.modes
    for part in objective.parts:
        for component in components(part.objective):
            if silent and isinstance(component, Denoiser):
                component = dataclasses.replace(component, mode=None)
            yield component


def _fills_spans(objective: Objective) -> bool:
    return isinstance(objective, SpanCorruption)


def _fills_masks(objective: Objective) -> bool:
    return isinstance(objective, MaskedLM | Infilling | BlankInfilling)


@functools.singledispatch
def form(
    objective: Objective, vocabulary: Vocabulary, ids: np.ndarray, two_streams: bool
) -> Prompt:
    """How one component, not a mixture, puts a prompt together."""
    raise ConfigError("objective", f"{type(objective).__name__} does not say how it is prompted")


@form.register
def _(objective: CausalLM, vocabulary: Vocabulary, ids: np.ndarray, two_streams: bool) -> Prompt:
    start = vocabulary.pad if vocabulary.bos is None else vocabulary.bos
    return Prompt(np.array([start, *ids], np.int32), text=ids)


@form.register
def _(objective: Denoiser, vocabulary: Vocabulary, ids: np.ndarray, two_streams: bool) -> Prompt:
    sentinels = vocabulary.sentinels
    lacking = _fills_spans(objective) and not np.isin(ids, sentinels).any()
    ids = np.array([*ids, *(sentinels[:1] if lacking else ())], np.int32)
    opened = [*objective.mode_ids(vocabulary), *ids]
    if not two_streams:
        return Prompt(np.array(opened, np.int32), prefix=True, text=ids)
    inputs = np.array([*opened, vocabulary.eos], np.int32)
    return Prompt(np.array([vocabulary.pad], np.int32), inputs, text=ids)


@form.register
def _(objective: MaskedLM, vocabulary: Vocabulary, ids: np.ndarray, two_streams: bool) -> Prompt:
    holes = np.flatnonzero(ids == vocabulary.mask)
    if not len(holes):
        raise ConfigError("prompt", "it has no <mask>, and this model fills masks")
    return Prompt(ids, prefix=True, text=ids, holes=holes)


@form.register
def _(objective: Infilling, vocabulary: Vocabulary, ids: np.ndarray, two_streams: bool) -> Prompt:
    holes = np.flatnonzero(ids == vocabulary.mask)
    if len(holes) != 1:
        raise ConfigError(
            "prompt", f"it has {len(holes)} <mask>, and this model fills one middle: write one"
        )
    start = vocabulary.pad if vocabulary.bos is None else vocabulary.bos
    before, after, middle = objective.mark_ids(vocabulary)
    prefix, suffix = ids[: holes[0]], ids[holes[0] + 1 :]
    opened = [before, *prefix, after, *suffix, middle]
    if objective.layout == "spm":
        opened = [before, after, *suffix, middle, *prefix]
    return Prompt(np.array([start, *opened], np.int32), text=ids, middle=int(holes[0]))


@form.register
def _(
    objective: BlankInfilling, vocabulary: Vocabulary, ids: np.ndarray, two_streams: bool
) -> Prompt:
    holes = np.flatnonzero(ids == vocabulary.mask)
    if not len(holes):  # it goes on: a blank at the end
        ids, holes = np.append(ids, objective.blank_id(vocabulary)), np.array([len(ids)])
    if len(holes) > 1:
        raise ConfigError("prompt", f"it has {len(holes)} <mask>; this model fills one at a time")
    start = vocabulary.pad if vocabulary.bos is None else vocabulary.bos
    at = int(holes[0])
    tokens = np.array([*ids, start], np.int32)
    tokens[at] = objective.blank_id(vocabulary)
    return Prompt(tokens, prefix=True, text=ids, middle=at, blank=at)
