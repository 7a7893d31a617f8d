"""State -> state transforms: once at the start of a phase, or periodically inside the step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax

from jaxpt.errors import ConfigError

# (TrainState after the optimizer's update, gradients or None, key) -> TrainState
UpdateFunction = Callable[[Any, "dict[str, Any] | None", jax.Array], Any]
# (model, its parameters, paths) -> path -> the gradient of the mean loss, on the batch that the
# step is about to be made on. The model may be another than the one that is trained.
Gradients = Callable[[Any, "dict[str, Any]", "Container[str]"], "dict[str, jax.Array]"]
# (TrainState that the step begins with, gradients, key) -> TrainState
BeforeFunction = Callable[[Any, Gradients, jax.Array], Any]


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

    def in_phase(self, phase: Any) -> Update:
        """Itself with its durations in steps of the phase."""
        return self

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

    def before(self, model: Any, optimizer: Any) -> BeforeFunction | None:
        """What a step calls before its own gradients are made, or None.

        It may ask for gradients on the step's batch, of any model (each is a pass of its own, to be
        made inside ``jax.lax.cond`` where it is not for every step). Arguments and errors are those
        of ``bind``.
        """
        return None

    def metrics(self, model: Any, state: Any) -> dict[str, Any]:
        """What it adds to every step's metrics: name -> scalar, or (sum, count)."""
        return {}

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


@dataclasses.dataclass(frozen=True)
class Bound:
    """A phase's updates as a step calls them, each in their order."""

    before: Sequence[tuple[int, BeforeFunction]] = ()  # with its place among the updates
    after: Sequence[UpdateFunction] = ()
    metrics: Sequence[Callable[[Any], dict[str, Any]]] = ()

    def begin(self, state: Any, gradients: Gradients, key: jax.Array) -> Any:
        """The state after what comes before a step's own gradients."""
        for i, before in self.before:
            own = jax.random.fold_in(jax.random.fold_in(key, i + 1), 0)
            state = before(state, gradients, own)
        return state

    def end(self, state: Any, grads: Any, key: jax.Array) -> Any:
        """The state after what comes after the optimizer."""
        for i, after in enumerate(self.after):
            state = after(state, grads, jax.random.fold_in(key, i + 1))
        return state

    def told(self, state: Any) -> dict[str, Any]:
        """The updates' metrics, of the state that a step ends with."""
        return {name: value for each in self.metrics for name, value in each(state).items()}


def bound(updates: Sequence[Update], model: Any, optimizer: Any) -> Bound:
    """The updates of a step. Raises ConfigError."""
    before, after = [], []
    for i, update in enumerate(updates):
        try:
            after.append(update.bind(model, optimizer))
            function = update.before(model, optimizer)
        except ConfigError as error:
            raise error.within(f"updates.{i}") from None
        if function is not None:
            before.append((i, function))
    return Bound(before, after, [functools.partial(u.metrics, model) for u in updates])
