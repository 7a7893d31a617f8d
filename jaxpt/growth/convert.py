"""The same matrices, held otherwise: dense to low rank, low rank to LoRA, and so on."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxpt.errors import ConfigError
from jaxpt.growth import periodic
from jaxpt.growth.base import Transition
from jaxpt.growth.periodic import Place
from jaxpt.state import flatten, unflatten
from jaxpt.weights.module import split


@dataclasses.dataclass(frozen=True)
class Convert(Transition):
    """Every weight of the new model stands for the matrix that the old one's stood for, or for the
    nearest that it can: ``new.from_dense(old.dense())``, layer by layer. What is held as before is
    copied, and so is all that is no weight.

        Dense -> LoRA       the same function: ReLoRA after a full-rank start
        Dense -> LowRank    truncated singular value decompositions (``LowRank(rank=0.5)`` gives
                            every matrix half its numbers)
        LoRA  -> Dense      the merge

    Where the new model has several networks and the old one is one, each is made of it.
    """

    def validate(self, old, new):
        """Raises ConfigError where the models differ in more than how their weights are held."""
        self._pairs(old, new)

    def __call__(self, params, old, new, key):
        weights, rest = self._pairs(old, new)
        flat, fresh = flatten(params), flatten(new.init(key))
        made = {path: flat[before].astype(new.tensors[path].dtype) for path, before in rest.items()}
        for place, before in weights:
            here = {name: fresh[path] for name, path in place.paths.items()}
            there = {name: flat[path] for name, path in before.paths.items()}
            converted = _converted(place, before, here, there)
            made |= {path: converted[name] for name, path in place.paths.items()}
        return unflatten({path: made[path] for path in new.tensors})

    def _pairs(self, old: Any, new: Any) -> tuple[list[tuple[Place, Place]], dict[str, str]]:
        """(new and old place of each weight, path of each other tensor -> its path in the old)."""
        places = {place.path: place for place in periodic.weights(old, lambda _: True)}
        held = {path for place in places.values() for path in place.paths.values()}
        used, weights, own = set(), [], set()
        for place in periodic.weights(new, lambda _: True):
            before = places.get(self._before(place.path, old, new))
            if before is None or _matrices(before) != _matrices(place):
                raise ConfigError(
                    "model",
                    f"{place.path} holds {_said(place)}, and before this phase {_said(before)}; "
                    "only how matrices are held may change",
                )
            weights.append((place, before))
            own |= set(place.paths.values())
            used.add(before.path)
        rest = {p: self._before(p, old, new) for p in new.tensors if p not in own}
        for path, before in rest.items():
            then = old.tensors[before].shape if before in old.tensors else "absent"
            if then != (now := new.tensors[path].shape):
                raise ConfigError(
                    "model", f"{path} is {now} in this phase and {then} before; it has to stay"
                )
        left = (old.tensors.keys() - held - set(rest.values())) | (places.keys() - used)
        if left:
            raise ConfigError("model", f"this phase has no place for {', '.join(sorted(left))}")
        return weights, rest

    def _before(self, path: str, old: Any, new: Any) -> str:
        """The path in the old model of what has ``path`` in the new one."""
        if "" not in old.config.networks or "" in new.config.networks:
            return path
        return path.partition("/")[2]


def _matrices(place: Place) -> tuple:
    assert place.product is not None
    return place.product.d_in, place.product.d_out, place.product.stack, place.stacked


def _said(place: Place | None) -> str:
    if place is None:
        return "nothing"
    d_in, d_out, stack, stacked = _matrices(place)
    return f"{stack} x {d_in} x {d_out}" if stacked else f"{d_in} x {d_out}"


def _converted(place: Place, before: Place, fresh: dict, params: dict) -> dict:
    """The parameters of a weight by name, from what they are at first and from the old ones."""
    new, old = place.product, before.product
    assert new is not None
    assert old is not None
    if new.weight == old.weight and _shapes(fresh) == _shapes(params):
        return {name: value.astype(fresh[name].dtype) for name, value in params.items()}

    def one(fresh, params):
        return split(new.module(fresh).from_dense(old.module(params).dense()))[1]

    if not place.stacked:
        return one(fresh, params)
    return jax.lax.map(lambda pair: one(*pair), (fresh, params))


def _shapes(params: dict) -> dict:
    return {name: value.shape for name, value in params.items()}
