"""What a model answers to labelled cases: what objectives judge it by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxpt.data.labelled import Case
from jaxpt.data.packing import Packer
from jaxpt.loading import Loaded
from jaxpt.objectives.base import Example
from jaxpt.objectives.labelled import CaseFeatures
from jaxpt.objectives.prompt import Prompt
from jaxpt.scoring import write


class Answers:
    """A run's model, asked about cases in the rows that its phase trains with.

    features: the host half of the phase's objective.
    """

    def __init__(self, loaded: Loaded):
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        program = loaded.program
        assert isinstance(program.features, CaseFeatures)
        self.features, self.rows = program.features, program.phase.batch
        packer = Packer(
            program.phase.length,
            program.phase.target_length,
            program.vocabulary.pad,
            extra=self.features.extra,
        )
        self._packer = self.features.packer(packer)

    def arrays(
        self, function: Callable[[Any, Any], jax.Array], cases: Sequence[Case]
    ) -> list[np.ndarray]:
        """What ``function`` of (network, batch) gives for each case: rows of its array [B, ...]."""
        return [rows[0] for rows in self.pieces(function, cases)]

    def pieces(
        self, function: Callable[[Any, Any], jax.Array], cases: Sequence[Case]
    ) -> list[list[np.ndarray]]:
        """``arrays`` of each case's examples, one or more: see ``CaseFeatures.examples``."""
        program = self.loaded.program
        replicated = program.layout.sharding(())
        step = jax.jit(
            lambda params, batch: function(program.model.bind(params), batch),
            out_shardings=replicated,
        )
        counts, pending, waiting = [], [], []

        def ask(examples: list[Example]) -> None:
            with program.layout.active():
                found = step(self.loaded.params, program.put(self._batch(examples)))
            pending.append((len(examples), found))

        for i in range(len(cases)):
            made = self.features.examples(cases[i], self.tokenizer)
            counts.append(len(made))
            waiting += made
            while len(waiting) >= self.rows:
                ask(waiting[: self.rows])
                waiting = waiting[self.rows :]
        if waiting:
            ask(waiting)
        rows = iter([row for n, found in pending for row in np.asarray(found)[:n]])
        return [list(itertools.islice(rows, count)) for count in counts]

    def texts(self, prompts: Sequence[Prompt], longest: int) -> list[str]:
        """What the model writes after each prompt, ``longest`` tokens at most, likeliest first."""
        return write(
            self.loaded.generator(),
            prompts,
            lambda ids: self.tokenizer.decode(ids, special=False),
            max_tokens=longest,
            batch=self.rows,
        )

    def _batch(self, examples: list[Example]) -> dict[str, np.ndarray]:
        """An example a row, and rows of padding to the phase's batch."""
        n = len(examples)
        filled = self._packer.fill(examples, self._packer.sizes(examples), np.arange(n))
        spare = self._packer.empty(self.rows - n)
        batch = {name: np.concatenate([filled[name], spare[name]]) for name in filled}
        if self.loaded.program.domains:
            batch["domains"] = np.zeros_like(batch["tasks"])
        return batch
