"""Go on with what is there: one network of several (the discriminator alone, after ELECTRA's
pretraining), or all but an output (a head in the place of the vocabulary's, to fine-tune)."""

from __future__ import annotations

import dataclasses

from jaxpt.errors import ConfigError
from jaxpt.growth.base import Transition
from jaxpt.paths import known, matches
from jaxpt.state import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Keep(Transition):
    """The parameters of ``network`` become the model's; what matches ``fresh`` is drawn anew.

        Keep("discriminator", fresh=("lm_head*",))     one network of several
        Keep(fresh=("head*",))                         the only one, with a head (``Headed``)

    What the new model lacks is dropped (the head of a discriminator, say), and what it has beyond
    the network has to be fresh.
    """

    network: str = ""  # name of the network in the model before; "" where that is one network
    fresh: tuple[str, ...] = ()  # patterns of parameters that the new model draws

    def validate(self, old, new):
        """Raises ConfigError for an unknown network, and for what has no or another shape in it."""
        names = sorted(old.config.networks)
        if self.network not in names:
            raise ConfigError(
                "network", f"no network {self.network!r}; known: {', '.join(map(repr, names))}"
            )
        for i, pattern in enumerate(self.fresh):
            if not any(matches(pattern, path) for path in new.tensors):
                raise ConfigError(
                    f"fresh.{i}", f"{pattern!r} matches no parameter; known: {known(new.tensors)}"
                )
        for path, tensor in new.tensors.items():
            before = old.tensors.get(f"{self.network}/{path}" if self.network else path)
            if not self._draws(path) and (before is None or before.shape != tensor.shape):
                what = "no such tensor" if before is None else f"one of {before.shape}"
                raise ConfigError(
                    "fresh",
                    f"{path} is {tensor.shape}, and {self.network or 'the model'} has {what}; "
                    "add a pattern that draws it",
                )

    def _draws(self, path: str) -> bool:
        return any(matches(pattern, path) for pattern in self.fresh)

    def __call__(self, params, old, new, key):
        self.validate(old, new)
        own = params[self.network] if self.network else params
        kept, drawn = flatten(own), flatten(new.init(key))
        return unflatten(
            {path: drawn[path] if self._draws(path) else kept[path] for path in new.tensors}
        )
