"""State -> state transforms: once at the start of a phase, or periodically inside the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxpt.errors import ConfigError

# (TrainState after the optimizer's update, gradients or None, key) -> TrainState
UpdateFunction = Callable[[Any, "dict[str, Any] | None", jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Transition:
    """A transform that a phase begins with; subclasses live in a file each in ``jaxpt/growth``.

    It may change shapes (grow, factorise, merge): ``old`` and ``new`` are the models before and
    after, equal where the phase does not change the model. Of a model it uses ``tensors``, the
    table by path, and ``init(key)``.
    """

    def validate(self, old: Any, new: Any) -> None:
        """Holds the transform against the models, before any device work. Raises ConfigError."""

    def __call__(
        self, params: dict[str, Any], old: Any, new: Any, key: jax.Array
    ) -> dict[str, Any]:
        """New parameters. ``params`` is the nested dict of ``old``'s parameters."""
        raise NotImplementedError

    def optimizer_state(
        self, state: Any, params: dict[str, Any], model: Any, optimizer: Any, key: jax.Array
    ) -> Any:
        """The optimizer's state after the transform, where the phase keeps it.

        Args:
          state: that of the phase before.
          params: of the phase's ``model``, after the transforms.
          optimizer: of the phase, ``Built``.
        """
        return state


@dataclasses.dataclass(frozen=True)
class Update:
    """A transform inside the train step, after the optimizer's; subclasses live in a file each.

    Runs in the compiled step: periodic work goes through ``jax.lax.cond`` on ``state.step``.
    """

    @property
    def name(self) -> str:
        """Key of its own state in ``TrainState.extra``."""
        return type(self).__name__

    def validate(self, phase: Any) -> None:
        """Holds the transform against the phase that it is in. Raises ConfigError."""

    def init(self, model: Any, params: dict[str, Any], key: jax.Array) -> Any:
        """Its own state, a pytree of arrays (or {})."""
        raise NotImplementedError

    @property
    def needs_gradients(self) -> bool:
        """Whether ``update`` looks at gradients, which not every step keeps."""
        return True

    def bind(self, model: Any, optimizer: Any) -> UpdateFunction:
        """What the step calls: ``update``, unless it has to know more than the state.

        Args:
          model: the Model that is trained.
          optimizer: its optimizer, ``Built``.

        Raises:
          ConfigError: a model or an optimizer that it can do nothing with.
        """
        return self.update

    def update(self, state: Any, grads: dict[str, Any] | None, key: jax.Array) -> Any:
        """The new TrainState; its own state stands in ``state.extra[self.name]``.

        ``grads`` are those of the whole batch, nested as the parameters; None where it does not
        need them and the step has not kept them.
        """
        raise NotImplementedError

    def eval_params(self, state: Any, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters to evaluate, sample and export with, given those that would be without
        this update; ``state`` is the TrainState."""
        return params


def bound(updates: Sequence[Update], model: Any, optimizer: Any) -> list[UpdateFunction]:
    """What a step calls after the optimizer, in order. Raises ConfigError."""
    functions = []
    for i, update in enumerate(updates):
        try:
            functions.append(update.bind(model, optimizer))
        except ConfigError as error:
            raise error.within(f"updates.{i}") from None
    return functions
