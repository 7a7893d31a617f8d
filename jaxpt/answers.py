"""What a model answers to labelled cases: what objectives judge it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxpt.data.labelled import Case
from jaxpt.data.packing import Packer
from jaxpt.loading import Loaded
from jaxpt.objectives.prompt import Prompt
from jaxpt.scoring import write


class Answers:
    """A run's model, asked about cases in the rows that its phase trains with.

    features: the host half of the phase's objective.
    """

    def __init__(self, loaded: Loaded):
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        program = loaded.program
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
        program = self.loaded.program
        replicated = program.layout.sharding(())
        step = jax.jit(
            lambda params, batch: function(program.model.bind(params), batch),
            out_shardings=replicated,
        )
        pending = []
        for start in range(0, len(cases), self.rows):
            chosen = [cases[i] for i in range(start, min(start + self.rows, len(cases)))]
            with program.layout.active():
                found = step(self.loaded.params, program.put(self._batch(chosen)))
            pending.append((len(chosen), found))
        return [row for n, found in pending for row in np.asarray(found)[:n]]

    def texts(self, prompts: Sequence[Prompt], longest: int) -> list[str]:
        """What the model writes after each prompt, ``longest`` tokens at most, likeliest first."""
        return write(
            self.loaded.generator(),
            prompts,
            lambda ids: self.tokenizer.decode(ids, special=False),
            max_tokens=longest,
            batch=self.rows,
        )

    def _batch(self, cases: Sequence[Case]) -> dict[str, np.ndarray]:
        """A case a row, and rows of padding to the phase's batch."""
        encoder, rng = self.features.encoder(self.tokenizer), np.random.default_rng(0)
        examples = [self.features.example(encoder.encode(case), 0, rng) for case in cases]
        filled = self._packer.fill(examples, self._packer.sizes(examples), np.arange(len(cases)))
        spare = self._packer.empty(self.rows - len(cases))
        batch = {name: np.concatenate([filled[name], spare[name]]) for name in filled}
        if self.loaded.program.domains:
            batch["domains"] = np.zeros_like(batch["tasks"])
        return batch
