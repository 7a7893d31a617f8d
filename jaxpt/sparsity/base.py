"""What a method of sparse training is: a pure function from what is seen to which units are held.

The first masks are those that a weight draws for itself (``weights.Masked``) or that ``AtStart``
chooses; a method gives new ones, ``renew``, at the steps at which it is ``due``. All of it is
inside the compiled step, before its gradients are made, so that a step always trains what the masks
of that step hold; no step compiles anew. To add one, write a file with a dataclass that derives
from ``Sparsify`` (or ``Periodic``, schedules.py).

Units that stay keep their numbers and moments; new ones begin at 0, with moments of 0. (The count
of updates, by which Adam corrects moments that began at 0, goes on: the first steps of a new entry
are up to (1 - b1) / sqrt(1 - b2) times lr.)
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.growth import periodic
from jaxpt.growth.base import Update
from jaxpt.growth.periodic import Flat, Place
from jaxpt.optimizers.eight_bit import MOMENTS, Quantised, dequantise, quantise
from jaxpt.optimizers.rules import one_layer
from jaxpt.paths import without_number
from jaxpt.state import flatten, unflatten
from jaxpt.weights import Dense
from jaxpt.weights.base import Tensor, Weight
from jaxpt.weights.patterns import Pattern
from jaxpt.weights.sparse import Sparse, SparseModule


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a method sees of one weight. L: layers that are stacked, 1 where they are not.

    weight: its config, with the pattern. shape: (d_in, d_out).
    support: bool [L, *grid], which units are held. matrix: [L, d_in, d_out], the numbers that
    compete: 0 where nothing is kept. params: all its parameters by name, [L, ...]. keys: one for
    each layer, which do not depend on whether layers are stacked.
    """

    weight: Sparse
    shape: tuple[int, int]
    support: jax.Array
    matrix: jax.Array
    params: Mapping[str, jax.Array]
    keys: jax.Array

    @property
    def pattern(self) -> Pattern:
        return self.weight.pattern

    @property
    def magnitude(self) -> jax.Array:
        """The mean of each unit's absolute numbers, [L, *grid]."""
        return self.pattern.mean(jnp.abs(self.matrix.astype(jnp.float32)))

    @property
    def bits(self) -> jax.Array:
        """A random word for each unit, uint32 [L, *grid]."""
        grid = self.support.shape[1:]
        return jax.vmap(lambda key: jax.random.bits(key, grid, jnp.uint32))(self.keys)


Matrices = dict[str, jax.Array]  # path of a weight -> [L, d_in, d_out]
Supports = dict[str, jax.Array]  # path of a weight -> bool [L, *grid]
# matrices -> the gradient of the mean loss of the step's batch for each of their entries, float32,
# were the weights these matrices
Slopes = Callable[[Matrices], Matrices]


@dataclasses.dataclass(frozen=True)
class Sparsify(Update):
    """A method that chooses which units are held, of all weights that are ``Sparse``.

    Adds to the metrics "density", the share of these matrices' entries that are held;
    "active_parameters", trained numbers less those that are not held; and
    "average_active_parameters", their mean over the phase's steps so far.
    """

    def due(self, step: jax.Array) -> jax.Array:
        """Whether to choose before this step of the phase, which counts from 0."""
        raise NotImplementedError

    def renew(self, step: jax.Array, seen: Mapping[str, Seen], slopes: Slopes) -> Supports:
        """The supports from this step on: a pure function.

        Args:
          step: of the phase, from 0.
          seen: by path of the weight.
          slopes: a forward and a backward pass of the dense model each time that it is called.
        """
        raise NotImplementedError

    def check(self, weights: Mapping[str, Place]) -> None:
        """Holds the method against the weights. Raises ConfigError."""

    @property
    def needs_gradients(self):
        return False  # after the step; what it needs before it asks for

    def init(self, model, params, key):
        return {"average": jnp.float32(0), "steps": jnp.int32(0)}

    def bind(self, model, optimizer):
        places = weights_of(model)

        def update(state, grads, key):
            own = state.extra[self.name]
            steps = own["steps"] + 1
            now = _active(model, places, flatten(state.params))[1]
            average = own["average"] + (now - own["average"]) / steps.astype(jnp.float32)
            extra = state.extra | {self.name: {"average": average, "steps": steps}}
            return dataclasses.replace(state, extra=extra)

        return update

    def metrics(self, model, state):
        held, active = _active(model, weights_of(model), flatten(state.params))
        return {
            "density": held / _entries(model),
            "active_parameters": active,
            "average_active_parameters": state.extra[self.name]["average"],
        }

    def before(self, model, optimizer):
        places = weights_of(model)
        check_states(optimizer, places, model)
        self.check(places)
        twin = dense_twin(model)
        paths = [path for place in places.values() for path in place.paths.values()]

        def before(state, gradients, key):
            flat = flatten(state.params)
            states = periodic.states_of(state.opt_state, state.params)
            step = state.opt_state.count - optimizer.start

            def renewed(params, states):
                seen = {path: see(place, params, key) for path, place in places.items()}

                def slopes(matrices):
                    own = {f"{path}/w": _unstacked(places[path], m) for path, m in matrices.items()}
                    rest = {path: flat[path] for path in twin.tensors if path not in own}
                    ordered = rest | own
                    ordered = {path: ordered[path] for path in twin.tensors}
                    found = gradients(twin, unflatten(ordered), own)
                    return {path: _stacked(places[path], found[f"{path}/w"]) for path in matrices}

                return moved(places, params, states, self.renew(step, seen, slopes))

            mine = ({path: tree[path] for path in paths} for tree in (flat, states))
            params, some = jax.lax.cond(self.due(step), renewed, lambda p, s: (p, s), *mine)
            return dataclasses.replace(
                state,
                params=unflatten(flat | params),
                opt_state=periodic.with_states(state.opt_state, state.params, states | some),
            )

        return before


def weights_of(model: Any) -> dict[str, Place]:
    """The sparse weights of a model, by path. Raises ConfigError where it has none."""
    found = periodic.weights(model, lambda product: isinstance(product.weight, Sparse))
    if not found:
        raise ConfigError(
            "", 'the model has no sparse weight: give model.weights=(("*", Masked()),)'
        )
    return {place.path: place for place in found}


def weight_of(place: Place) -> Sparse:
    """The config of a sparse weight."""
    assert place.product is not None
    assert isinstance(place.product.weight, Sparse)
    return place.product.weight


def _module(place: Place, params: Flat) -> SparseModule:
    """Of one layer, with its parameters by name."""
    assert place.product is not None
    module = place.product.module(params)
    assert isinstance(module, SparseModule)
    return module


def see(place: Place, params: Flat, key: jax.Array) -> Seen:
    """What there is to see of a weight, given all parameters by path."""
    product = place.product
    assert product is not None
    own = {name: _stacked(place, params[path]) for name, path in place.paths.items()}
    number = re.search(r"_(\d+)(?=/|$)", place.path)
    key = jax.random.fold_in(key, zlib.crc32(without_number(f"{place.path}/").encode()))
    first = int(number.group(1)) if number else 0
    layers = first + jnp.arange(len(next(iter(own.values()))))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(layers)

    def one(params):
        module = _module(place, params)
        return module.support(), module.numbers()

    support, matrix = jax.vmap(one)(own)
    return Seen(weight_of(place), (product.d_in, product.d_out), support, matrix, own, keys)


def moved(
    places: Mapping[str, Place], params: Flat, states: Flat, supports: Supports
) -> tuple[Flat, Flat]:
    """(params, states), by path, with these supports: of units that are new both are 0."""
    params, states = dict(params), dict(states)
    for at, place in places.items():
        here = {name: _stacked(place, params[path]) for name, path in place.paths.items()}
        known = {
            name: jax.tree.map(lambda x, place=place: _stacked(place, x), states[path])
            for name, path in place.paths.items()
        }

        def one(params, states, support, place=place):
            module = _module(place, params)
            new, moments = dict(params), dict(states)
            for name in weight_of(place).held:
                shape = params[name].shape
                carry = lambda x: module.carry(x, support)  # noqa: E731
                new[name] = carry(params[name])
                moments[name] = carried(states[name], shape, carry)
            return new | module.places(support), moments

        new, moments = jax.vmap(one)(here, known, supports[at])
        for name, path in place.paths.items():
            params[path] = _unstacked(place, new[name]).astype(params[path].dtype)
            states[path] = jax.tree.map(lambda x, place=place: _unstacked(place, x), moments[name])
    return params, states


def check_states(optimizer: Any, places: Mapping[str, Place], model: Any) -> None:
    """``check_state`` for what sparse weights hold, where it is lost when it is left out."""
    for place in places.values():
        weight = weight_of(place)
        for name in () if weight.keeps else weight.held:
            check_state(optimizer, place.paths[name], model.tensors[place.paths[name]])


def check_state(optimizer: Any, path: str, tensor: Tensor) -> None:
    """Raises ConfigError where the optimizer's state of a parameter has no entry for each of its
    entries, so that moments of new entries cannot begin at 0."""
    rule = optimizer.rules.get(path)
    if rule is None:
        return
    row = one_layer(tensor)
    apart = not rule.together
    if apart:
        state = jax.eval_shape(rule.init, jax.ShapeDtypeStruct(row.shape, row.dtype))
        leaves = jax.tree.leaves(state, is_leaf=_is_quantised)
        apart = all(_is_quantised(x) or x.shape in (row.shape, ()) for x in leaves)
    if not apart:
        raise ConfigError(
            "",
            f"the optimizer's state of {path} does not stand entry by entry, so that that of new "
            "entries cannot begin at 0; give AdamW, Lion, SGD or another that does",
        )


def dense_twin(model: Any) -> Any:
    """The same model with every sparse weight held as ``Dense``."""

    def twin(value: Any) -> Any:
        if isinstance(value, Sparse):
            return Dense()
        if isinstance(value, tuple):
            return tuple(map(twin, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, Weight | type):
            changes = {f.name: twin(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **changes)
        return value

    return twin(model.config).build(model.vocab_size)


def _active(model: Any, places: Mapping[str, Place], flat: Flat) -> tuple[jax.Array, jax.Array]:
    """(entries of sparse weights that are held, trained numbers less those that are not held)."""
    held, full = jnp.float32(0), 0
    for place in places.values():
        own = {name: _stacked(place, flat[path]) for name, path in place.paths.items()}
        held += jax.vmap(lambda own, place=place: _module(place, own).entries())(own).sum()
        full += sum(own[name].size for name in weight_of(place).held)
    return held, held + (model.parameters - full)


def _entries(model: Any) -> int:
    """Of all matrices that are sparse."""
    products = [place.product for place in weights_of(model).values()]
    return sum(p.d_in * p.d_out * p.stack for p in products if p is not None)


def _stacked(place: Place, x: jax.Array) -> jax.Array:
    return x if place.stacked else x[None]


def _unstacked(place: Place, x: jax.Array) -> jax.Array:
    return x if place.stacked else x[0]


def carried(state: Any, shape: tuple[int, ...], carry: Callable) -> Any:
    """The optimizer's state of a parameter of this shape, carried to a new support."""

    def one(path, x):
        if isinstance(x, Quantised):
            signed = MOMENTS[path[-1].name]
            return quantise(carry(dequantise(x, signed=signed)), signed=signed)
        return carry(x) if x.shape == shape else x

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=_is_quantised)


def _is_quantised(x: Any) -> bool:
    return isinstance(x, Quantised)
