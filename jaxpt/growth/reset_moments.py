"""Optimizer states that begin anew every so often (Glentis et al. 2025, "Scalable Parameter and
Memory Efficient Pretraining for LLM: Recent Algorithmic Advances and Benchmarking": momentum reset;
Lialin et al. 2023, "ReLoRA", section 3: partial reset)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.growth import periodic
from jaxpt.growth.base import Update
from jaxpt.growth.periodic import Place
from jaxpt.optimizers.eight_bit import MOMENTS, Quantised, dequantise
from jaxpt.paths import known, matches

Kind = Literal["zero", "magnitude", "random"]
KINDS: tuple[Kind, ...] = ("zero", "magnitude", "random")


@dataclasses.dataclass(frozen=True)
class Resetting:
    """How an optimizer's states begin anew.

        zero        the state that the optimizer begins with, whatever it is made of
        magnitude   of the moments all but the share ``1 - share`` of the largest become 0
        random      likewise, of entries drawn at random

    All moments of a parameter lose the same entries, by the magnitude of the first: an entry that
    kept its first moment and lost its second would make a step without bound. (The authors' code
    prunes each by itself.) The count of updates, by which Adam corrects moments that began at 0,
    goes on: the first steps after a reset are up to (1 - b1) / sqrt(1 - b2) times lr, which is
    what the learning rate's ``Restarts`` are for.
    """

    reset: Kind = "magnitude"  # what begins anew
    share: float = 0.99  # share of the entries of the moments that become 0 (not with zero)

    def __post_init__(self):
        if self.reset not in KINDS:
            raise ConfigError("reset", f"{self.reset!r} is not one of {', '.join(KINDS)}")
        if not 0 < self.share <= 1:
            raise ConfigError("share", f"{self.share} does not lie in (0, 1]")

    def states(
        self, optimizer: Any, place: Place, params: dict, states: dict, key: jax.Array
    ) -> dict:
        """The states of a place's parameters begun anew, by name, of one layer."""
        if self.reset == "zero":
            return periodic.fresh_states(optimizer, place, params)
        keys = jax.random.split(key, len(states))
        return {
            name: self._pruned(state, own)
            for (name, state), own in zip(states.items(), keys, strict=True)
        }

    def _pruned(self, state: Any, key: jax.Array) -> Any:
        masks = {}

        def one(path, x):
            name = _moment(path)
            if name is None:
                return x
            values = dequantise(x, signed=MOMENTS[name]) if isinstance(x, Quantised) else x
            if values.shape not in masks:
                masks[values.shape] = self._kept(values, key)
            kept = masks[values.shape]
            if isinstance(x, Quantised):  # the code of 0 is 0
                return x._replace(codes=jnp.where(kept, x.codes, 0).astype(x.codes.dtype))
            return jnp.where(kept, x, 0).astype(x.dtype)

        return jax.tree_util.tree_map_with_path(one, state, is_leaf=_is_quantised)

    def _kept(self, values: jax.Array, key: jax.Array) -> jax.Array:
        if self.reset == "random":
            return jax.random.uniform(key, values.shape) >= self.share
        sizes = jnp.abs(values.astype(jnp.float32))
        return sizes > jnp.quantile(sizes, self.share)

    def check(self, optimizer: Any, places: list[Place], model: Any) -> None:
        """Raises ConfigError where the optimizer's states have nothing that can be reset so."""
        for place in places:
            shapes = {}
            for name, path in place.paths.items():
                tensor = model.tensors[path]
                shape = tensor.shape[1:] if tensor.stacked else tensor.shape
                shapes[name] = jax.ShapeDtypeStruct(shape, tensor.dtype)
            found = jax.eval_shape(
                lambda params, place=place: periodic.fresh_states(optimizer, place, params), shapes
            )
            for name, path in place.paths.items():
                leaves = jax.tree_util.tree_flatten_with_path(found[name], is_leaf=_is_quantised)[0]
                if path not in optimizer.rules:
                    raise ConfigError("", f"{path} is frozen: it has no state that could be reset")
                if self.reset != "zero" and not any(_moment(at) for at, _ in leaves):
                    raise ConfigError(
                        "reset",
                        f"{self.reset!r} is not valid: the optimizer's state of {path} has no "
                        f"moments called {', '.join(MOMENTS)}; give 'zero'",
                    )


def _moment(path) -> str | None:
    name = getattr(path[-1], "name", None) if path else None
    return name if name in MOMENTS else None


def _is_quantised(x: Any) -> bool:
    return isinstance(x, Quantised)


@dataclasses.dataclass(frozen=True)
class ResetMoments(Update, Resetting):
    """Every ``every`` updates of the phase the optimizer's states of some parameters begin anew.

    By default those of the factors of low-rank weights, at the same updates as ``Refactorise``
    where that comes before it in a phase's ``updates``: a moment of an old factor says little of
    a new one.
    """

    reset: Kind = "zero"  # what begins anew
    every: int = 200  # updates between two resets
    patterns: tuple[str, ...] = ()  # which parameters, shell-style; (): factors of low-rank weights

    def __post_init__(self):
        super().__post_init__()
        periodic.check_every(self.every)

    @property
    def needs_gradients(self):
        return False

    def init(self, model, params, key):
        return {}

    def bind(self, model, optimizer):
        places = self._places(model)
        self.check(optimizer, places, model)

        def change(place, params, states, key):
            return params, self.states(optimizer, place, params, states, key)

        return periodic.periodically(optimizer, self.every, places, change)

    def _places(self, model: Any) -> list[Place]:
        if not self.patterns:
            return factors(model)
        for i, pattern in enumerate(self.patterns):
            if not any(matches(pattern, path) for path in model.tensors):
                raise ConfigError(
                    f"patterns.{i}",
                    f"{pattern!r} matches no parameter; known: {known(model.tensors)}",
                )
        found: dict[tuple[str, bool], list[str]] = {}
        for path, tensor in model.tensors.items():
            if any(matches(pattern, path) for pattern in self.patterns):
                parent, _, name = path.rpartition("/")
                found.setdefault((parent, tensor.stacked), []).append(name)
        return [Place(path, tuple(names), stacked) for (path, stacked), names in found.items()]


def factors(model: Any) -> list[Place]:
    """The factors of a model's low-rank weights. Raises ConfigError where it has none."""
    found = [
        dataclasses.replace(place, names=place.product.weight.factors)
        for place in periodic.weights(model, lambda product: bool(product.weight.factors))
        if place.product is not None
    ]
    found = [p for p in found if all(model.tensors[path].trained for path in p.paths.values())]
    if not found:
        raise ConfigError("", "the model has no low-rank weight that is trained")
    return found
