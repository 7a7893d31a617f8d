"""Work on some parameters and on what the optimizer knows of them, every so many steps.

It is done one layer of a stack after the other, so that what a change makes on the way (a whole
matrix, say) lives for one layer only.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax

from jaxpt.errors import ConfigError
from jaxpt.growth.average import Average
from jaxpt.growth.base import UpdateFunction
from jaxpt.optimizers.rules import gathered, scattered, units
from jaxpt.paths import without_number
from jaxpt.state import flatten, unflatten
from jaxpt.weights.base import Product

Flat = dict[str, Any]  # path -> array, or state of the optimizer


@dataclasses.dataclass(frozen=True)
class Place:
    """Parameters that a change sees together, by their last names: those of a weight, or any.

    product: the weight's; None where it is no weight.
    """

    path: str
    names: tuple[str, ...]
    stacked: bool
    product: Product | None = None

    @property
    def paths(self) -> dict[str, str]:
        """Name -> path of each parameter."""
        return {name: f"{self.path}/{name}" if self.path else name for name in self.names}


# (place, parameters by name, states by name, key), all of one layer -> the new ones
Change = Callable[[Place, Flat, Flat, jax.Array], tuple[Flat, Flat]]


def weights(model: Any, wanted: Callable[[Product], bool]) -> list[Place]:
    """The weights of a model that are wanted, each with all its parameters."""
    found: dict[str, list[str]] = {}
    for path in model.tensors:
        parent, _, name = path.rpartition("/")
        found.setdefault(parent, []).append(name)
    return [
        Place(path, tuple(found[path]), model.tensors[f"{path}/{found[path][0]}"].stacked, product)
        for path, product in model.products.items()
        if wanted(product)
    ]


def periodically(optimizer: Any, every: int, places: list[Place], change: Change) -> UpdateFunction:
    """The update that puts ``places`` through ``change`` after every ``every``-th update of the
    phase (the learning rate's schedule counts the same updates)."""
    paths = [path for place in places for path in place.paths.values()]

    def update(state, grads, key):
        flat, states = flatten(state.params), states_of(state.opt_state, state.params)
        part = {path: flat[path] for path in paths}, {path: states[path] for path in paths}
        due = (state.opt_state.count - optimizer.start) % every == 0
        new_params, new_states = jax.lax.cond(
            due, lambda p, s: changed(places, p, s, change, key), lambda p, s: (p, s), *part
        )
        return dataclasses.replace(
            state,
            params=unflatten(flat | new_params),
            opt_state=with_states(state.opt_state, state.params, states | new_states),
        )

    return update


def changed(
    places: list[Place], params: Flat, states: Flat, change: Change, key: jax.Array
) -> tuple[Flat, Flat]:
    """(params, states), by path, with every place changed; each layer has a key of its own, which
    does not depend on whether layers are stacked."""
    params, states = dict(params), dict(states)
    for place in places:
        number = re.search(r"_(\d+)(?=/|$)", place.path)
        own = jax.random.fold_in(key, zlib.crc32(without_number(f"{place.path}/").encode()))
        here = {n: params[path] for n, path in place.paths.items()}
        known = {n: states[path] for n, path in place.paths.items()}
        if place.stacked:
            new = _in_turn(place, here, known, change, own)
        else:
            at = int(number.group(1)) if number else 0
            new = change(place, here, known, jax.random.fold_in(own, at))
        params |= {path: new[0][name] for name, path in place.paths.items()}
        states |= {path: new[1][name] for name, path in place.paths.items()}
    return params, states


def _in_turn(place: Place, params: Flat, states: Flat, change: Change, key: jax.Array):
    def layer(i, carry):
        # All is read before anything is written: else XLA keeps copies of the whole carry.
        here = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), carry)
        here, known = jax.lax.optimization_barrier(here)
        new = change(place, here, known, jax.random.fold_in(key, i))
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, 0), carry, new
        )

    return jax.lax.fori_loop(0, len(jax.tree.leaves(params)[0]), layer, (params, states))


def states_of(opt_state: Any, params: Any) -> Flat:
    """Path of a parameter -> the optimizer's state of it."""
    tree = jax.tree.structure(params)
    return dict(zip(flatten(params), tree.flatten_up_to(opt_state.states), strict=True))


def with_states(opt_state: Any, params: Any, states: Flat) -> Any:
    """The optimizer's state with these: inverts ``states_of``."""
    tree = jax.tree.structure(params)
    return opt_state._replace(states=tree.unflatten(states[path] for path in flatten(params)))


def fresh_states(optimizer: Any, place: Place, params: Flat) -> Flat:
    """The optimizer's first state of each parameter of a place, by name, of one layer; None where
    there is none.

    Raises:
      ConfigError: a parameter that is updated together with others than the place's.
    """
    paths = place.paths
    names = {path: name for name, path in paths.items()}
    by_path, states = {path: params[name] for name, path in paths.items()}, {}
    for unit in units(optimizer.rules, by_path):
        if not names.keys() >= set(unit):
            raise ConfigError(
                "", f"{', '.join(unit)} are updated as one: their states begin anew together"
            )
        states |= scattered(unit, optimizer.rules[unit[0]].init(gathered(by_path, unit)))
    return {name: states.get(path) for name, path in paths.items()}


def check_no_average(phase: Any) -> None:
    """Factors from before and after they are exchanged have no meaningful average."""
    if any(isinstance(update, Average) for update in phase.updates):
        raise ConfigError(
            "",
            "exchanges factors in mid-phase, of which an Average would mix old and new; leave it",
        )


def check_every(every: int) -> None:
    if every < 1:
        raise ConfigError("every", f"{every} is not valid; give 1 or more")
