"""Whole channels and heads pruned in training, and the smaller model that is left (Li et al. 2025,
"EfficientLLM: Scalable Pruning-Aware Pretraining for Architecture-Agnostic Edge Language Models").

    Phase(..., updates=(PruneGroups(channels=0.5, heads=0.75),)),
    Phase(..., model=smaller, begin=(Shrink(),)),

A *group* is what can be left out of a layer without changing any other shape: a channel of its
feed-forward part (a column of up and gate with its biases, a row of down), or a head of attention
(where heads share keys and values, all that share them).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.duration import Duration, share
from jaxpt.errors import ConfigError
from jaxpt.growth import periodic
from jaxpt.growth.base import Transition
from jaxpt.sparsity.base import carried, check_state
from jaxpt.sparsity.schedules import Periodic, cubic
from jaxpt.state import flatten, unflatten
from jaxpt.weights.selection import top

PARTS = ("mlp", "attention", "cross_attention")  # modules of a layer that are made of groups
AXES = ("mlp", "heads", "kv_heads")  # logical axes along which groups lie


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of one module of a layer, or of a stack of layers.

    heads: whether they are heads. count: how many each layer has. members: (path, axis of one
    layer's array) of every array that has a part in them, in equal stretches along that axis.
    """

    heads: bool
    stacked: bool
    count: int
    members: tuple[tuple[str, int], ...]


def groups_of(model: Any) -> dict[str, Groups]:
    """Path of a module -> its groups.

    Raises:
      ConfigError: arrays of heads that layers share, or a matrix that is not held as ``Dense``.
    """
    attention = getattr(model.config, "attention", None)
    if attention is None:
        raise ConfigError("model", f"{type(model.config).__name__} is no single network of layers")
    found: dict[str, list[tuple[str, int]]] = {}
    for path, tensor in model.tensors.items():
        axes = tensor.axes[1:] if tensor.stacked else tensor.axes
        for axis, name in enumerate(axes):
            if name not in AXES:
                continue
            parts = path.split("/")
            at = next((i for i in reversed(range(len(parts))) if parts[i] in PARTS), None)
            if at is None or tensor.weight not in ("Dense", "bias"):
                raise ConfigError("model", f"{path} has heads or channels that cannot be left out")
            found.setdefault("/".join(parts[: at + 1]), []).append((path, axis))
    made = {}
    for parent, members in found.items():
        heads, tensor = not parent.endswith("/mlp"), model.tensors[members[0][0]]
        count = attention.groups() if heads else tensor.shape[members[0][1] + tensor.stacked]
        made[parent] = Groups(heads, tensor.stacked, count, tuple(members))
    return made


def per_group(x: jax.Array, axis: int, count: int) -> jax.Array:
    """[..., n, ...] -> [count]: the sum over each of ``count`` stretches of an axis."""
    x = jnp.moveaxis(x.astype(jnp.float32), axis, 0)
    return x.reshape(count, -1).sum(1)


@dataclasses.dataclass(frozen=True)
class PruneGroups(Periodic):
    """Groups are pruned by their saliency, fewer and fewer of each layer by the cubic schedule, to
    the shares that are asked for. Saliency is an average over steps of

        |sum over the group's entries of p dL/dp|

    by how much, to first order, the loss would change without the group. What is pruned is set to
    0, moments too, and so has no gradient ever after (a channel whose input and output are 0
    neither moves nor is moved): the model computes as one without it, and ``Shrink`` makes it one
    without changing any output. Smaller and faster after ``Shrink``; dense until then.
    """

    channels: float = 0.5  # share of the feed-forward channels that stays
    heads: float = 1.0  # share of the heads (of keys and values) that stays
    start: int | float | Duration = share(0.1)  # where in the phase pruning begins
    stop: int | float | Duration = share(0.8)  # where in the phase it ends
    decay: float = 0.9  # share of the average saliency that a step keeps

    def __post_init__(self):
        for name in ("channels", "heads"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(name, f"{getattr(self, name)} does not lie in (0, 1]")
        if not 0 <= self.decay < 1:
            raise ConfigError("decay", f"{self.decay} does not lie in [0, 1)")

    @property
    def needs_gradients(self):
        return True

    def init(self, model, params, key):
        flat, found = flatten(params), {}
        for parent, groups in groups_of(model).items():
            layers = len(flat[groups.members[0][0]]) if groups.stacked else 1
            shape = (layers, groups.count)
            found[parent] = {"saliency": jnp.zeros(shape), "alive": jnp.ones(shape, bool)}
        return found

    def before(self, model, optimizer):
        return None

    def metrics(self, model, state):
        alive = [own["alive"] for own in state.extra[self.name].values()]
        shares = [(jnp.sum(x, dtype=jnp.float32), float(x.size)) for x in alive]
        return {"groups": (sum(n for n, _ in shares), jnp.float32(sum(n for _, n in shares)))}

    def bind(self, model, optimizer):
        every = groups_of(model)
        for groups in every.values():
            for path, _ in groups.members:
                check_state(optimizer, path, model.tensors[path])
        counts = {parent: self.counts(groups) for parent, groups in every.items()}

        def update(state, grads, key):
            flat, slopes = flatten(state.params), flatten(grads)
            states = periodic.states_of(state.opt_state, state.params)
            # The update that has just been made was the step's own: it is counted already.
            step = state.opt_state.count - optimizer.start
            own = {}
            for parent, groups in every.items():
                old = state.extra[self.name][parent]
                now = self.saliency(groups, flat, slopes)
                average = old["saliency"] * self.decay + (1 - self.decay) * now
                own[parent] = {"saliency": average, "alive": old["alive"]}

            def prune(own, flat, states):
                own, flat, states = dict(own), dict(flat), dict(states)
                for parent, groups in every.items():
                    now = own[parent]
                    scores = jnp.where(now["alive"], now["saliency"], -1.0)
                    alive = top(scores, counts[parent][self.number(step)], (-1,))
                    own[parent] = now | {"alive": alive}
                    for path, axis in groups.members:
                        flat[path], states[path] = zeroed(
                            groups, alive, axis, flat[path], states[path]
                        )
                return own, flat, states

            mine = [path for groups in every.values() for path, _ in groups.members]
            some = ({path: tree[path] for path in mine} for tree in (flat, states))
            own, params, moments = jax.lax.cond(
                self.due(step), prune, lambda *same: same, own, *some
            )
            return dataclasses.replace(
                state,
                params=unflatten(flat | params),
                opt_state=periodic.with_states(state.opt_state, state.params, states | moments),
                extra=state.extra | {self.name: own},
            )

        return update

    def counts(self, groups: Groups) -> jax.Array:
        """Groups of a layer that stay after update 0, 1, ..., int32."""
        last = self.heads if groups.heads else self.channels
        shares = cubic(1.0, last, self.updates)
        return jnp.asarray([max(1, int(s * groups.count + 0.5)) for s in shares], jnp.int32)

    def saliency(self, groups: Groups, flat: dict, slopes: dict) -> jax.Array:
        """Of one step, float32 [L, count]."""

        def one(pairs):
            sums = [
                per_group(p.astype(jnp.float32) * g.astype(jnp.float32), axis, groups.count)
                for (p, g), (_, axis) in zip(pairs, groups.members, strict=True)
            ]
            return jnp.abs(sum(sums[1:], sums[0]))

        pairs = [(flat[path], slopes[path]) for path, _ in groups.members]
        return jax.vmap(one)(pairs) if groups.stacked else one(pairs)[None]


def zeroed(groups: Groups, alive: jax.Array, axis: int, param: jax.Array, state: Any):
    """(a member, its state) with 0 in the place of the groups that are not alive, [L, count]."""

    def one(alive, param, state):
        n = param.shape[axis]
        kept = jnp.repeat(alive, n // groups.count, total_repeat_length=n)
        kept = kept.reshape([-1 if i == axis else 1 for i in range(param.ndim)])
        carry = lambda x: jnp.where(kept, x, jnp.zeros((), x.dtype))  # noqa: E731
        return carry(param), carried(state, param.shape, carry)

    if groups.stacked:
        return jax.vmap(one)(alive, param, state)
    return one(alive[0], param, state)


@dataclasses.dataclass(frozen=True)
class Shrink(Transition):
    """The model with fewer feed-forward channels and heads: of each layer those groups stay, in
    their order, whose squared entries sum to the most. After ``PruneGroups`` with as many groups
    the others are 0, and no output changes. Optimizer states begin anew, as shapes change.

    The new model differs in ``mlp.width``, ``attention.heads`` (and ``kv_heads``) alone, and its
    heads are as wide: give ``attention.head_dim``.
    """

    def validate(self, old, new):
        before, after = groups_of(old), groups_of(new)
        if old.tensors.keys() != new.tensors.keys():
            raise ConfigError("model", "only the numbers of channels and heads may change")
        for path, tensor in old.tensors.items():
            shape = new.tensors[path].shape
            for axis, n, m in zip(tensor.axes, tensor.shape, shape, strict=True):
                if n != m and (axis not in AXES or m > n):
                    raise ConfigError("model", f"{path} is {tensor.shape} before and {shape} here")
        for parent, groups in before.items():
            for path, axis in groups.members:
                at = axis + groups.stacked
                widths = [
                    model.tensors[path].shape[at] / each[parent].count
                    for model, each in ((old, before), (new, after))
                ]
                if widths[0] != widths[1]:
                    raise ConfigError(
                        "model",
                        f"{path} has {widths[0]:g} features a head before and "
                        f"{widths[1]:g} here; set attention.head_dim",
                    )

    def __call__(self, params, old, new, key):
        flat, after = flatten(params), groups_of(new)
        for parent, groups in groups_of(old).items():
            count = after[parent].count

            def one(arrays, groups=groups, count=count):
                members = [axis for _, axis in groups.members]
                sums = [
                    per_group(jnp.square(x.astype(jnp.float32)), axis, groups.count)
                    for x, axis in zip(arrays, members, strict=True)
                ]
                kept = jnp.nonzero(top(sum(sums[1:], sums[0]), count, (-1,)), size=count)[0]
                return [
                    taken(x, axis, kept, groups.count)
                    for x, axis in zip(arrays, members, strict=True)
                ]

            arrays = [flat[path] for path, _ in groups.members]
            arrays = jax.vmap(one)(arrays) if groups.stacked else one(arrays)
            flat |= {path: x for (path, _), x in zip(groups.members, arrays, strict=True)}
        return unflatten(flat)


def taken(x: jax.Array, axis: int, kept: jax.Array, count: int) -> jax.Array:
    """The stretches ``kept`` of the ``count`` that an axis is made of."""
    width = x.shape[axis] // count
    rows = (kept[:, None] * width + np.arange(width)).reshape(-1)
    return jnp.take(x, rows, axis=axis)
