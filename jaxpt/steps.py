"""Functional builders of the steps: pure functions of pytrees, and how they are compiled.

A train step is ``(state, batch, key) -> (state, metrics)``, an eval step ``(params, batch) ->
metrics``. Metrics map a name to a float32 scalar, or to a (sum, count) pair, which stays a pair
until whoever reads it divides. Nothing here knows of files, logs or time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpt.errors import ConfigError
from jaxpt.growth.base import Bound, Gradients, Update, bound
from jaxpt.guard import NAME as GUARD
from jaxpt.guard import TOLD, Guard, only_if
from jaxpt.mesh import Layout
from jaxpt.models.model import Model
from jaxpt.objectives.base import Batch, Loss, Objective
from jaxpt.optimizers.base import Built
from jaxpt.state import Params, TrainState, flatten, trainable, whole

Metrics = dict[str, Any]  # name -> scalar, or (sum, count)
StepFunction = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
LossFunction = Callable[[Params, Batch, jax.Array | None], Loss]
NOTHING = Bound()  # no updates
UNGUARDED = Guard(non_finite=False)


@dataclasses.dataclass(frozen=True)
class Step:
    """The ordinary train step: one backward pass through the whole model, or several of them."""

    accumulate: int = 1  # micro-batches a step; their gradients are added up before the update

    def __post_init__(self):
        if self.accumulate < 1:
            raise ConfigError("accumulate", f"{self.accumulate} is not valid; give 1 or more")

    def validate(self, guard: Guard) -> None:
        """Holds the step against the run's guard. Raises ConfigError."""

    def build(
        self,
        model: Model,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        updates: Sequence[Update] = (),
        domains: Sequence[str] = (),
        guard: Guard = UNGUARDED,
    ) -> StepFunction:
        """The pure step function, not compiled.

        Args:
          updates: transforms of the state at the end of the step.
          domains: names of the data's domains, where there are several; see ``loss_function``.
          guard: which updates are left out; what it knows stands in ``TrainState.extra``.
        """
        losses = functools.partial(loss_function, objective=objective, domains=domains)
        after = bound(updates, model, optimizer)
        inner = train_step(losses(model), optimizer, self.accumulate, after, losses, guard)

        def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
            return inner(state, objective.whole(batch), key)

        return step


def loss_function(model: Model, objective: Objective, domains: Sequence[str] = ()) -> LossFunction:
    """(params, batch, key) -> Loss, for whatever differentiates it.

    Its metrics also have "tokens/NAME", the share of the targets of each task where there are
    several; and for each of ``domains`` (the batch then has a field ``domains``) the same as
    "domain_tokens/NAME", and "domain_loss/NAME", nats per target, which is made of
    ``Loss.tokens``. These are gone then: what is left is sums, which add up over micro-batches.
    """

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        found = objective.loss(model.bind(params), batch, key)
        metrics = found.metrics | shares("tokens", objective.tasks, batch, "tasks")
        metrics |= shares("domain_tokens", domains, batch, "domains")
        if found.tokens is not None and len(domains) > 1:
            loss_BT, weights_BT = found.tokens
            for i, name in enumerate(domains):
                share_BT = jnp.where(batch["domains"] == i, weights_BT, 0.0)
                metrics[f"domain_loss/{name}"] = (jnp.sum(share_BT * loss_BT), share_BT.sum())
        return dataclasses.replace(found, metrics=metrics, tokens=None)

    return loss


def shares(title: str, names: Sequence[str], batch: Batch, field: str) -> Metrics:
    """TITLE/NAME: the share of the targets' weights where ``field`` is the number of NAME."""
    if len(names) < 2:
        return {}
    weights_BT = batch["weights"].astype(jnp.float32)
    return {
        f"{title}/{name}": (
            jnp.sum(jnp.where(batch[field] == i, weights_BT, 0.0)),
            weights_BT.sum(),
        )
        for i, name in enumerate(names)
    }


def train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    updates: Bound = NOTHING,
    losses: Callable[[Model], LossFunction] | None = None,
    guard: Guard = UNGUARDED,
) -> StepFunction:
    """A step of gradient descent on the mean loss of the global batch.

    The gradient is that of sum(loss) / sum(count) over all micro-batches and devices: it does
    not depend on how the batch is cut. Of what is frozen none is made. ``losses``: of any model,
    for updates that ask before the step.

    Where the ``guard`` leaves the update out, the new state is the old one, but for what the guard
    knows; what ``updates`` do before the step is undone. (Apart from what ``Grass`` does then: it
    merges, which changes no matrix, and chooses rows again at the next step.)
    """
    trained = optimizer.rules if isinstance(optimizer, Built) else None
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        first = state = begun(optimizer, loss, state, batch, key, accumulate)
        state = updates.begin(state, looks(losses, batch, key, accumulate), key)
        sums, grads = accumulated_gradients(loss, state.params, batch, key, accumulate, trained)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1).astype(g.dtype), grads)
        grads = whole(grads, jax.tree.map(jnp.zeros_like, state.params))
        norm = optax.tree.norm(trainable(grads, trained))
        good, known = judged(guard, state, sums, norm)

        def update(state: TrainState, grads: Params, first: TrainState):
            changes, opt_state = optimizer.update(grads, state.opt_state, state.params, norm=norm)
            params: Any = optax.apply_updates(state.params, changes)
            new = TrainState(state.step + 1, params, opt_state, state.extra)
            update_norm = optax.tree.norm(trainable(changes)).astype(jnp.float32)
            return updates.end(new, grads, key), update_norm

        def leave_out(state: TrainState, grads: Params, first: TrainState):
            return first, jnp.float32(0)

        new, update_norm = only_if(good, update, leave_out, state, grads, first)
        metrics = {
            "loss": (sums.total, sums.count),
            **learnt(sums.metrics, good),
            **token_counts(batch),
            **updates.told(new),
            **pace(optimizer, state),
            "grad_norm": norm,
            "update_norm": update_norm,
            "param_norm": optax.tree.norm(trainable(new.params)),
        }
        return noted(new, metrics, known)

    return step


def judged(
    guard: Guard, state: TrainState, sums: Loss, norm: jax.Array
) -> tuple[jax.Array | None, dict[str, Any]]:
    """(whether the update is made, None where nothing is judged; what the guard knows now)."""
    if not guard.on:
        return None, {}
    return guard.judge(state.extra[GUARD], sums.total / jnp.maximum(sums.count, 1), norm)


def learnt(metrics: Metrics, good: jax.Array | None) -> Metrics:
    """The loss's metrics, without what a mixing policy would learn from a step left out."""
    if good is None:
        return metrics
    return {
        name: tuple(jnp.where(good, x, 0.0) for x in pair) if "domain_loss/" in name else pair
        for name, pair in metrics.items()
    }


def pace(optimizer: Any, state: TrainState) -> Metrics:
    """``learning_rate``: that of the update that a step begins, before any group's own scale."""
    if not isinstance(optimizer, Built) or optimizer.rate is None:
        return {}
    return {"learning_rate": optimizer.rate(state.opt_state.count)}


def noted(state: TrainState, metrics: Metrics, known: dict[str, Any]) -> tuple[TrainState, Metrics]:
    """The state with what the guard knows, and the metrics: "skipped", updates left out so far,
    and "guard/..." of ``TOLD``, for whoever acts upon them."""
    if not known:
        return state, metrics
    told = {"skipped": known["skipped"]}
    told |= {f"guard/{name}": known[name] for name in TOLD}
    return dataclasses.replace(state, extra=state.extra | {GUARD: known}), metrics | told


def begun(
    optimizer: optax.GradientTransformation,
    loss: LossFunction,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    accumulate: int = 1,
) -> TrainState:
    """The state after what the optimizer does before a step's gradients."""
    if not isinstance(optimizer, Built) or optimizer.before is None:
        return state

    def gradients(paths: Container[str]) -> dict[str, jax.Array]:
        return flatten(accumulated_gradients(loss, state.params, batch, key, accumulate, paths)[1])

    params = optimizer.before(state.params, state.opt_state.count, gradients)
    return dataclasses.replace(state, params=params)


def looks(
    losses: Callable[[Model], LossFunction] | None,
    batch: Batch,
    key: jax.Array,
    accumulate: int = 1,
) -> Gradients:
    """The mean loss's gradients on a step's batch, of any model, for what comes before the step."""

    def gradients(model: Model, params: Params, paths: Container[str]) -> dict[str, jax.Array]:
        assert losses is not None
        sums, grads = accumulated_gradients(losses(model), params, batch, key, accumulate, paths)
        count = jnp.maximum(sums.count, 1)
        return {path: g / count.astype(g.dtype) for path, g in flatten(grads).items()}

    return gradients


def accumulated_gradients(
    loss: LossFunction,
    params: Params,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
    paths: Container[str] | None = None,
) -> tuple[Loss, Params]:
    """The Loss of the whole batch, and the gradient of its total (not yet divided), in float32;
    None where a parameter is made of integers, or is not among ``paths`` where they are given.

    Micro-batch i takes rows i, i + accumulate, ...: so where rows are cut over devices, every
    device has its share of every micro-batch.
    """

    def gradient(batch, key):
        def total(trained):
            sums = loss(whole(trained, params), batch, key)
            return sums.total, sums

        (_, sums), grads = jax.value_and_grad(total, has_aux=True)(trainable(params, paths))
        return sums, grads

    if accumulate == 1:
        return gradient(batch, key)
    micro = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )
    keys = jax.random.split(key, accumulate)
    first = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], micro), keys[0])
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)), first
    )

    def add(carry, xs):
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, gradient(*xs)), None

    return jax.lax.scan(add, zeros, (micro, keys))[0]


def eval_step(loss: LossFunction) -> Callable[[Params, Batch], Metrics]:
    """The loss and its metrics without dropout, as (sum, count) pairs."""

    def step(params: Params, batch: Batch) -> Metrics:
        sums = loss(params, batch, None)
        return {"loss": (sums.total, sums.count), **sums.metrics, **token_counts(batch)}

    return step


def token_counts(batch: Batch) -> Metrics:
    """``tokens``: real tokens of the batch, all streams; ``fill``: their share of the positions."""
    segments = [batch[name] for name in ("segments", "input_segments") if name in batch]
    real = sum(jnp.sum(s != 0, dtype=jnp.float32) for s in segments)
    return {"tokens": real, "fill": (real, jnp.float32(sum(s.size for s in segments)))}


# Layout of the state, and compilation.


def state_shardings(abstract: TrainState, model: Model, layout: Layout) -> TrainState:
    """Where each array of the state lies: parameters by their logical axes, optimizer and extra
    state like the parameter whose path theirs ends with, the rest on every device. The optimizer's
    is cut further where the layout says so (``Mesh.shard_state``)."""
    flat, treedef = jax.tree_util.tree_flatten(abstract)
    placed = []
    for path, leaf in zip(flatten(abstract), flat, strict=True):
        place = _like_parameter(path, leaf.shape, model=model, layout=layout)
        if layout.shard_state and path.startswith("opt_state/"):
            place = layout.spread(place, leaf.shape)
        placed.append(place)
    return treedef.unflatten(placed)


def _like_parameter(
    path: str, shape: tuple[int, ...], *, model: Model, layout: Layout
) -> NamedSharding:
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    parts = path.split("/")
    # The longest match: 'opt_state/0/mu/head/w' belongs to 'head/w', not to a tensor named 'w'.
    for start in range(len(parts)):
        for stop in range(len(parts), start, -1):
            own = "/".join(parts[start:stop])
            tensor = model.tensors.get(own)
            if tensor is None:
                continue
            if shape == tensor.shape:
                return layout.sharding(tensor.axes, shape, own)
            axes = _kept_axes(tensor.shape, tensor.axes, shape)
            return layout.sharding(axes, path=own) if axes is not None else replicated
    return replicated


def _kept_axes(full: tuple[int, ...], axes: tuple, shape: tuple[int, ...]):
    """Logical axes of a reduced copy of a tensor, or None if it is no such.

    With as many dimensions (moments in a subspace, what projects onto it, scales of blocks) a side
    that is as long as the tensor's has its axis: the same side's, else another's, for what is
    turned round. With fewer (factored moments) the sides that are left are in order.
    """
    if len(shape) == len(full):
        own = [axis if n == m else None for axis, n, m in zip(axes, full, shape, strict=True)]
        for i, size in enumerate(shape):
            if own[i] is None:
                others = (a for a, n in zip(axes, full, strict=True) if n == size and a not in own)
                own[i] = next(others, None)
        return tuple(own)
    kept, at = [], 0
    for size in shape:
        while at < len(full) and full[at] != size:
            at += 1
        if at == len(full):
            return None
        kept.append(axes[at])
        at += 1
    return tuple(kept)


def batch_shardings(batch: Batch, layout: Layout) -> dict[str, NamedSharding]:
    """Rows over the batch axes, positions over the length axis."""
    return {
        name: layout.sharding(("batch", "length")[: x.ndim], x.shape) for name, x in batch.items()
    }


@dataclasses.dataclass
class Compiled:
    """A step compiled for a mesh. Calling it dispatches it; ``program`` answers what it costs."""

    program: Any  # jax.stages.Compiled
    batch: dict[str, NamedSharding]

    def __call__(self, *args):
        return self.program(*args)


def compile_train_step(
    step: StepFunction, state: TrainState, batch: Batch, layout: Layout
) -> Compiled:
    """Compiles ahead of time, from shapes alone; the state is donated.

    Args:
      state: ShapeDtypeStructs with shardings.
      batch: ShapeDtypeStructs without.
    """
    shardings = jax.tree.map(lambda a: a.sharding, state)
    batch_places = batch_shardings(batch, layout)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    jitted = jax.jit(
        step,
        in_shardings=(shardings, batch_places, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        keep_unused=True,  # what is only written (by the guard) is donated too
    )
    with layout.active():
        lowered = jitted.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0)))
    return Compiled(lowered.compile(), batch_places)


def compile_eval_step(step: Callable, params: Params, batch: Batch, layout: Layout) -> Compiled:
    """As ``compile_train_step``, for ``(params, batch) -> metrics``; nothing is donated."""
    batch_places = batch_shardings(batch, layout)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    jitted = jax.jit(
        step,
        in_shardings=(jax.tree.map(lambda a: a.sharding, params), batch_places),
        out_shardings=everywhere,
    )
    with layout.active():
        lowered = jitted.lower(params, batch)
    return Compiled(lowered.compile(), batch_places)
