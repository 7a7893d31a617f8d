"""Re-initialise some parameters at a phase's start, e.g. the embeddings for a new vocabulary."""

from __future__ import annotations

import dataclasses

from jaxpt.errors import ConfigError
from jaxpt.growth.base import Transition
from jaxpt.paths import known, matches
from jaxpt.state import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Reset(Transition):
    """Parameters that match a pattern are drawn anew, as the new model draws them; the rest stay.

    Re-drawing embeddings in mid-run makes a model that adapts more easily (Chen et al. 2023,
    "Improving Language Plasticity via Pretraining with Active Forgetting"). What is reset may
    have another shape in the new model, what stays may not; what the new model lacks is dropped.
    """

    patterns: tuple[str, ...]  # which parameters, shell-style over their paths

    def validate(self, old, new):
        """Raises ConfigError for a pattern without a parameter, or what stays but cannot."""
        for i, pattern in enumerate(self.patterns):
            if not any(matches(pattern, path) for path in new.tensors):
                raise ConfigError(
                    f"patterns.{i}",
                    f"{pattern!r} matches no parameter; known: {known(new.tensors)}",
                )
        for path, tensor in new.tensors.items():
            before = old.tensors[path].shape if path in old.tensors else "absent"
            if before != tensor.shape and not self.resets(path):
                raise ConfigError(
                    "patterns",
                    f"{path} is {before} before this phase and {tensor.shape} in it; "
                    "add a pattern that resets it",
                )

    def resets(self, path: str) -> bool:
        return any(matches(pattern, path) for pattern in self.patterns)

    def __call__(self, params, old, new, key):
        self.validate(old, new)
        kept, fresh = flatten(params), flatten(new.init(key))
        return unflatten(
            {path: fresh[path] if self.resets(path) else kept[path] for path in new.tensors}
        )
