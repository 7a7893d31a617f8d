"""What an objective is: a host half that makes examples, a device half that gives a loss.

Host half. ``Objective.build(vocabulary, ...)`` binds lengths and special ids and returns a
``Features``: it says how many raw tokens its next example wants, and turns a stretch of raw
tokens into an example, a dict of 1-D arrays:

    tokens   int32 [n]    what the decoder (or the only stack) reads
    targets  int32 [n]    what it is to predict at each position (already shifted)
    weights  float32 [n]  loss weight of each target; 0 where there is nothing to predict
    prefix   int32 [n]    1 where every query of the example may see this position (optional, 0)
    inputs   int32 [m]    what the encoder reads (encoder-decoder models only)
    task     int          index into ``Objective.tasks`` of the component that made it

Packing adds ``segments`` and ``positions`` (``input_segments``, ``input_positions``) and
spreads ``task`` over the example's targets as ``tasks``: see ``jaxpt/data/packing.py``.

Device half. ``Objective.loss(model, batch, key)`` gives a ``Loss``, which stays a (sum, count)
pair until the whole global batch has been added up.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxpt.errors import ConfigError

if TYPE_CHECKING:
    from jaxpt.data.base import Source
    from jaxpt.data.packing import Packer
    from jaxpt.data.vocabulary import Vocabulary
    from jaxpt.objectives.lengths import Lengths

Example = dict[str, Any]  # arrays, but for `task`, an int
Batch = Mapping[str, Any]  # arrays, or while shapes are all that is known ShapeDtypeStructs


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Loss:
    """``total`` is differentiated; ``total / count`` is the mean loss. Both float32 scalars.

    metrics: name -> (sum, count), each a mean of its own once the batch has been added up.
    tokens: (loss, weight) of each target, float32 of the batch's [B, T], without gradient; None
      where an objective has no such thing. The step makes each domain's loss of it.
    """

    total: jax.Array
    count: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]] = dataclasses.field(default_factory=dict)
    tokens: tuple[jax.Array, jax.Array] | None = None


class Features:
    """The host half of an objective, bound to a vocabulary and to lengths.

    lengths: one per task: raw tokens of the longest example, what it takes, its sentinels.
    document_end: the id that the loader appends to every document before it cuts stretches, as
      an ordinary raw token; None where the objective marks its own ends (denoisers).
    extra: names of further int32 fields that its examples have, one value for each of ``tokens``;
      0 at padding.
    needs: what the examples ask of the model: field of its config -> the least that it must be.
    prepare: None, but where rows hold what examples are made of: the pure function of arrays that
      makes the step's batch of a batch of them, on the device.
    """

    lengths: tuple[Lengths, ...]
    document_end: int | None = None
    extra: tuple[str, ...] = ()
    needs: Mapping[str, int] = types.MappingProxyType({})
    prepare: Callable[[Batch], Batch] | None = None

    def request(self, rng: np.random.Generator, step: int = 0) -> tuple[int, int]:
        """(task, raw tokens wanted) of the next example; fewer may come at a document's end.

        ``step`` is the step of the phase at which the example's window of rows begins.
        """
        raise NotImplementedError

    def encoder(self, tokenizer: Any) -> Any:
        """What makes raw tokens of the source's documents: ``encode(document) -> int32 [n]``. The
        tokenizer, unless the documents are no texts."""
        return tokenizer

    def count(self, task: int, n: int) -> Lengths:
        """The most that an example of ``n`` raw tokens takes; never less for a larger n."""
        raise NotImplementedError

    def measure(self, task: int, n: int, rng: np.random.Generator, step: int = 0) -> Lengths:
        """What an example of ``n`` raw tokens takes, made with these random numbers.

        Where that is random and can be told without making the example: so it is packed for what
        it takes. By default the most.
        """
        return self.count(task, n)

    def example(
        self, tokens: np.ndarray, task: int, rng: np.random.Generator, step: int = 0
    ) -> Example:
        """Turns int32 ``tokens`` (1 to the number requested) into an example; drops none."""
        raise NotImplementedError

    def packer(self, plain: Packer) -> Packer:
        """What lays the examples in rows, given what would lay those of ``base.py``'s form."""
        return plain

    def text(self, example: Example) -> np.ndarray:
        """The inverse of ``example``: the raw tokens that it was made of."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config of an objective; subclasses live in a file each in ``jaxpt/objectives``."""

    # Whether it learns from ``Case`` (jaxpt/data/labelled.py), and not from texts.
    labelled = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the components that examples come from; loss is reported for each."""
        raise NotImplementedError

    @property
    def in_place(self) -> bool:
        """Whether every target stands where its own token was hidden, so that a model which sees
        both ways (``kind="encoder"``) cannot read it ahead. Shifted targets do not."""
        return False

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the model has to give, and all that it may: an output that no loss reaches would
        never be trained. See ``ModelConfig.outputs``."""
        return ("tokens",)

    @property
    def on_host(self) -> Objective:
        """The same objective with a host half that makes whole examples, to look at and to ask."""
        return self

    @property
    def validated(self) -> tuple[str, ...]:
        """Metrics that validation reports beside the loss and the accuracy of the targets."""
        return ()

    def check(self, source: Source, model: Any) -> None:
        """Holds the objective against the phase's source and the model's config: whether labels are
        given where they are wanted. Raises ConfigError."""
        if self.labelled != source.labelled:
            gives, wants = ("labels" if x.labelled else "no labels" for x in (source, self))
            names = type(source).__name__, type(self).__name__
            raise ConfigError("data", f"{names[0]} gives {gives}, and {names[1]} wants {wants}")

    def only(self, task: int) -> Objective:
        """The objective with one component alone, for evaluating it."""
        raise NotImplementedError

    def build(self, vocabulary: Vocabulary, *, length: int, target_length: int | None) -> Features:
        """The host half.

        Args:
          vocabulary: sizes and special ids.
          length: positions of a row of the only stack, or of the encoder.
          target_length: positions of a row of the decoder; None where there is one stack.

        Raises:
          ConfigError: what would be truncated or lacks special ids, with the numbers. Its field
            is ``length``, ``target_length``, ``sentinels`` (of the vocabulary), or one of this
            objective's own.
        """
        raise NotImplementedError

    def baseline(self, targets: np.ndarray) -> float | None:
        """The loss of one answer for all ``targets`` (int32 [n]), the best that there is; None:
        their unigram entropy, in nats."""
        return None

    def figures(self, answers: Any, cases: Any) -> dict[str, float]:
        """What all cases of a split tell at once, beside the loss; {} where there is nothing.

        Args:
          answers: ``jaxpt.answers.Answers``, what the model says.
          cases: ``jaxpt.data.labelled.Cases``.
        """
        return {}

    def whole(self, batch: Batch) -> Batch:
        """The global batch with what only all of it can tell, in fields with a value a row.

        The step calls it before it cuts the batch into micro-batches. ``loss`` does without the
        fields where they are missing, and then takes its batch for the whole.
        """
        return batch

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        """The device half; ``key`` is None when evaluating (no dropout)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Wrapper(Objective):
    """An objective with another host half: all else is ``objective``'s own."""

    objective: Objective  # what makes the examples

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.objective.tasks

    @property
    def in_place(self) -> bool:
        return self.objective.in_place

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.objective.outputs

    @property
    def validated(self) -> tuple[str, ...]:
        return self.objective.validated

    def whole(self, batch: Batch) -> Batch:
        return self.objective.whole(batch)

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        return self.objective.loss(model, batch, key)
