"""A network and its frozen teacher, as one model: for distillation (Hinton et al. 2015)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpt.errors import ConfigError
from jaxpt.models.base import Kind, ModelConfig
from jaxpt.models.network import Network
from jaxpt.models.stack import Layers, watched
from jaxpt.models.transformer import Transformer
from jaxpt.weights.base import Scope, WeightModule
from jaxpt.weights.dense import DenseModule
from jaxpt.weights.module import merge, split

Seen = tuple[jax.Array, list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Distilled(ModelConfig):
    """``student`` is trained, ``teacher`` is not: none of its numbers has a gradient or an
    optimizer state, or decays. Both read the same batch; an objective says what the one learns of
    the other (``objectives.PELA``). Where a model is to give tokens, it is the student.

        Phase(model=Distilled(student, teacher), begin=(Convert(),), ...)
                                       both are made of the model before, the student by
                                       ``from_dense`` where its weights are others
        Phase(model=student, begin=(Keep("student"),), ...)
                                       and the teacher goes
    """

    student: Transformer  # what is trained
    teacher: Transformer  # what it learns from, frozen

    def __post_init__(self):
        for field in ("kind", "vocab_multiple"):
            mine, other = getattr(self.student, field), getattr(self.teacher, field)
            if mine != other:
                raise ConfigError(
                    f"student.{field}", f"{mine!r} differs from the teacher's {other!r}"
                )
        for name, network in self.networks.items():
            if network.outputs != ("tokens",):
                raise ConfigError(name, f"a {type(network).__name__} gives no tokens")

    @property
    def kind(self) -> Kind:
        return self.student.kind

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("tokens", "teacher")

    @property
    def max_length(self) -> int | None:
        ends = [network.max_length for network in self.networks.values()]
        return min((end for end in ends if end is not None), default=None)

    @property
    def inner_positions(self) -> int:
        return min(network.inner_positions for network in self.networks.values())

    @property
    def networks(self) -> Mapping[str, Transformer]:
        return {"student": self.student, "teacher": self.teacher}

    def with_stacks(self) -> Distilled:
        return Distilled(self.student.with_stacks(), self.teacher.with_stacks())

    def validate(self, length: int, target_length: int | None = None) -> None:
        for name, network in self.networks.items():
            try:
                network.validate(length, target_length)
            except ConfigError as error:
                raise error.within(name) from None

    def network(self, vocab_size: int, scope: Scope) -> DistilledNetwork:
        made = []
        for name, config in self.networks.items():
            at = scope.network(name, config.rules, frozen=name == "teacher")
            made.append(Network(config, vocab_size, at))
        return DistilledNetwork(*made)


class DistilledNetwork(nnx.Module):
    """Both networks; what is asked of a ``Network``, the student answers."""

    def __init__(self, student: Network, teacher: Network):
        self.student, self.teacher = student, teacher
        self.vocab_size = student.vocab_size

    def __call__(self, batch: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        return self.student(batch, key)

    def both(self, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[Seen, Seen]:
        """(states, outputs of the layers) of the student and of the teacher, who has no dropout and
        no gradient. Outputs are [L, B, T, D] of each stack: see ``watched``."""
        with watched() as outputs:
            states_BTD = self.student(batch, key)
        with watched() as taught:
            targets_BTD = self.teacher(batch)
        return (states_BTD, outputs), jax.lax.stop_gradient((targets_BTD, taught))

    def encode(self, batch: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        return self.student.encode(batch, key)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        return self.student.logits(x_BTD)

    def init_cache(self, *args, **kwargs):
        return self.student.init_cache(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.student.decode(*args, **kwargs)

    def perturbation(self) -> jax.Array:
        """How far the student's matrices are from the teacher's, float32: the mean of
        ||W' - W||_F^2 / ||W||_F^2 over all that are not held dense. One at a time is formed.

        Raises:
          ConfigError: such a matrix that the teacher has not.
        """
        taught = dict(_weights(self.teacher))
        total, count = jnp.float32(0), 0
        for path, (module, stacked) in _weights(self.student):
            if isinstance(module, DenseModule):
                continue
            if path not in taught or taught[path][1] != stacked:
                raise ConfigError("model", f"the teacher has no matrix {path} as the student has")
            distance, params = _distance(module, taught[path][0])
            each = jax.lax.map(distance, params) if stacked else distance(params)[None]
            total, count = total + jnp.sum(each), count + len(each)
        if not count:
            raise ConfigError("model", "all matrices of the student are dense")
        return total / count


def _distance(module: WeightModule, taught: WeightModule):
    """(a function of both parameters, of one layer, and what it is a function of)."""
    (mine, own), (other, theirs) = split(module), split(taught)

    @jax.checkpoint  # else its matrices would be kept for the backward pass
    def distance(params):
        own, theirs = params
        new, old = (
            merge(template, each).dense().astype(jnp.float32)
            for template, each in ((mine, own), (other, theirs))
        )
        return jnp.sum(jnp.square(new - old)) / jnp.sum(jnp.square(old))

    return distance, (own, theirs)


def _weights(
    module: nnx.Module, path: str = "", stacked: bool = False
) -> Iterator[tuple[str, tuple[WeightModule, bool]]]:
    """(path, (weight, whether its layers are stacked)) of all weights in a module."""
    for name, child in sorted(vars(module).items()):
        if not isinstance(child, nnx.Module):
            continue
        within = stacked or (isinstance(module, Layers) and name == "layers")
        if isinstance(child, WeightModule):
            yield f"{path}{name}", (child, within)
        else:
            yield from _weights(child, f"{path}{name}/", within)
