"""The train step that updates a layer as soon as its gradient is there.

The backward pass goes layer by layer from the last to the first. A layer's gradient makes the
change of the layer's parameters at once, in place, and is gone: there is never more than one
layer's gradient. (Lv et al. 2023, "Full parameter fine-tuning for large language models with
limited resources", section 3, for SGD; here for every optimizer.)

How it is done: a stack of layers, where the model comes to one, is an opaque function of its input
x and of what all its layers share (the position bias, the encoder's output). With stacks numbered
in the order of their calls, and y_j the output of stack j,

    (x_i, shared_i) = before_i(rest, y_0 ... y_{i-1})        y_i = stack_i(x_i, shared_i)
    loss            = after(rest, y_0 ... y_{n-1})

where ``rest`` are the parameters outside the stacks. Every ``before`` and ``after`` is
differentiated as a whole, each stack by the loop here, which keeps the inputs of its layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Var

from jaxpt.errors import ConfigError
from jaxpt.growth.base import Bound, Update, bound
from jaxpt.guard import Guard, kept, only_if
from jaxpt.models import stacking
from jaxpt.models.model import Model
from jaxpt.models.stack import Layers, running
from jaxpt.objectives.base import Batch, Objective
from jaxpt.optimizers.base import Built
from jaxpt.optimizers.in_place import update_in_place
from jaxpt.optimizers.rules import ByTensor, gathered, keys_of, one_layer, scattered, units
from jaxpt.state import Params, TrainState, flatten, trainable, unflatten, whole
from jaxpt.steps import (
    NOTHING,
    UNGUARDED,
    LossFunction,
    Metrics,
    Step,
    StepFunction,
    begun,
    judged,
    learnt,
    looks,
    loss_function,
    noted,
    pace,
    token_counts,
)

Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LayerwiseStep(Step):
    """As ``Step``, with no more than one layer's gradient at a time.

    Each layer's gradient is clipped by its own norm, and so are those of what stands behind the
    layers and of what stands before them: of n parts to ``clip`` / sqrt(n), so that the norm of
    them all is at most ``clip``. (The global norm is not known before the last layer has been
    reached.) With ``clip`` None the losses are those of ``Step``.

    A guard knows the loss before the first update, and leaves all of them out where that is not
    finite, or a spike. Of a gradient that is not finite, with a loss that is, the backward pass
    comes to know at some layer: that layer and all that come after it (those that stand before it,
    and the embedding) are left as they are, with their states; those that it has come from have had
    their update, of gradients that were finite. So no number that is not finite gets into the
    state, and the counts of updates are as they were; but an update can be made of a part.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.accumulate != 1:
            raise ConfigError(
                "accumulate", f"{self.accumulate} is not valid: what is updated at once is not kept"
            )

    def validate(self, guard: Guard) -> None:
        if guard.spikes == "skip" and guard.gradient_score is not None:
            raise ConfigError(
                "guard.gradient_score",
                f"{guard.gradient_score} cannot be looked at: the norm is known when layers have "
                "been updated; give None, or guard.spikes roll_back",
            )

    def build(
        self,
        model: Model,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        updates: Sequence[Update] = (),
        domains: Sequence[str] = (),
        guard: Guard = UNGUARDED,
    ) -> StepFunction:
        if not any(tensor.stacked for tensor in model.tensors.values()):
            raise ConfigError("step", "updates layers in a loop: the model needs scan=True")
        for i, each in enumerate(updates):
            if each.needs_gradients:
                name = type(each).__name__
                raise ConfigError(
                    f"updates.{i}", f"{name} needs gradients, which no step keeps here"
                )
        assert isinstance(optimizer, Built)
        losses = functools.partial(loss_function, objective=objective, domains=domains)
        after = bound(updates, model, optimizer)
        spared = lambda model: _sparing(losses(model))  # noqa: E731
        inner = layerwise_step(losses(model), model, optimizer, after, spared, guard)

        def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
            return inner(state, objective.whole(batch), key)

        return step


@dataclasses.dataclass
class Stage:
    """A stack that has been run.

    inputs: [L / period, B, T, D], of every layer (of the first of a period).
    pull: cotangents of (x, shared) -> those of (rest, outputs of the stacks before).
    reads: paths of the rest that x and shared depend on (other than by stacks before).
    """

    layers: Layers
    context: Any
    shared: Any
    keys: Any
    inputs: jax.Array
    pull: Callable
    reads: set[str]


class _Reached(Exception):
    """Ends the tracing of a model at the input of a stack."""


def layerwise_step(
    loss: LossFunction,
    model: Model,
    optimizer: Built,
    updates: Bound = NOTHING,
    losses: Callable[[Model], LossFunction] | None = None,
    guard: Guard = UNGUARDED,
) -> StepFunction:
    """A step of gradient descent on the mean loss of a batch, layer by layer. ``losses``: of any
    model, for updates that ask before the step."""
    stacked = {path for path, tensor in model.tensors.items() if tensor.stacked}

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        first = state = begun(optimizer, _sparing(loss), state, batch, key)
        state = updates.begin(state, looks(losses, batch, key), key)
        flat, own = flatten(state.params), _states(state.opt_state, state.params)
        rest = {path: p for path, p in flat.items() if path not in stacked}
        rest = trainable(rest, optimizer.rules)
        stages, sums, pull, reads = _forward(loss, flat, rest, batch, key)
        parts = 1 + sum(1 + stage.layers.depth // stage.layers.period for stage in stages)
        allowed = judged(guard, state, sums, jnp.float32(0))[0]  # as far as the loss tells
        update = _Update(model, optimizer, state.opt_state.count, parts, allowed)
        g_rest, g_outputs = pull(1 / jnp.maximum(sums.count, 1).astype(sums.total.dtype))
        # No zeros in the place of gradients that are still to come.
        later = set().union(*(stage.reads for stage in stages))
        g_rest = {p: g for p, g in g_rest.items() if g is not None and p not in later - reads}
        while stages:
            stage, g_y, g_outputs = stages.pop(), g_outputs[-1], g_outputs[:-1]
            # Whose gradient is whole. The cotangent was made with them: it comes first.
            later = set().union(*(each.reads for each in [stage, *stages]))
            done = {p: g_rest.pop(p) for p in list(g_rest) if p not in later}
            done, g_y = jax.lax.optimization_barrier((done, g_y))
            _rest(done, flat, own, update)
            more_rest, more_outputs = stage.pull(_backward(stage, g_y, flat, own, update))
            for p in stage.reads:
                g_rest[p] = g_rest[p] + more_rest[p] if p in g_rest else more_rest[p]
            g_outputs = jax.tree.map(jnp.add, g_outputs, more_outputs)
        _rest(g_rest, flat, own, update)
        tree = jax.tree.structure(state.params)
        states = tree.unflatten(own[path] for path in flatten(state.params))
        grad_norm, update_norm = jnp.sqrt(update.norms)
        seen = grad_norm if allowed is None else jnp.where(allowed, grad_norm, 0.0)
        good, known = judged(guard, state, sums, seen)
        count, at = kept(
            good, (state.opt_state.count + 1, state.step + 1), (state.opt_state.count, state.step)
        )
        result = TrainState(at, unflatten(flat), ByTensor(count, states), state.extra)
        if updates.after:
            end = lambda state: updates.end(state, None, key)  # noqa: E731
            result = only_if(good, end, lambda state: state, result)
        if updates.before:
            result = kept(allowed, result, first)
        metrics = {
            "loss": (sums.total, sums.count),
            **learnt(sums.metrics, good),
            **token_counts(batch),
            **updates.told(result),
            **pace(optimizer, state),
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "param_norm": optax.tree.norm(trainable(result.params)),
        }
        return noted(result, metrics, known)

    return step


def _forward(loss: LossFunction, flat: Flat, rest: Any, batch: Batch, key: jax.Array):
    """Runs the model, stack by stack.

    Returns:
      (the stages, the Loss, pull: a cotangent of its total -> those of rest and of the stages'
      outputs; paths of the rest that the total depends on, other than by the stages).
    """
    stages: list[Stage] = []
    outputs: list[jax.Array] = []
    while True:
        reached: list[tuple] = []

        def part(rest, outputs, reached=reached):
            """(x, shared) of the next stack, or the loss where there is no more."""
            given = iter(outputs)

            def runner(stack, x, context, key):
                y = next(given, None)
                if y is None:
                    reached.append((stack, context, key, x))
                    raise _Reached
                return y

            params = flat | {path: p for path, p in rest.items() if p is not None}
            try:
                with running(runner):
                    sums = loss(unflatten(params), batch, key)
            except _Reached:
                _, context, _, x = reached[-1]
                return (x, (context.bias, context.encoded)), None
            return sums.total, sums

        reads = _reads(lambda rest, part=part, given=outputs: part(rest, given)[0], rest)
        found, pull, sums = jax.vjp(part, rest, outputs, has_aux=True)
        if sums is not None:
            return stages, sums, pull, reads
        (layers, context, layer_key, _), (x, shared) = reached[-1], found
        keys = None if layer_key is None else jax.random.split(layer_key, layers.depth)
        keys = layers.by_period((keys, jnp.arange(layers.depth)))
        unit = layers.unit(_with(context, shared))

        def body(x, xs, unit=unit):
            return unit(x, None, *xs)[0], x

        params = unflatten(_of_stack(layers, flat))
        y, inputs = jax.lax.scan(body, x, (layers.by_period(params), *keys))
        stages.append(Stage(layers, context, shared, keys, inputs, pull, reads))
        outputs.append(y)


def _sparing(loss: LossFunction) -> LossFunction:
    """The loss, for gradients of a few numbers in an ordinary backward pass: that, too, keeps of
    the stacks no more than the layers' inputs."""

    def runner(layers, x, context, key):
        keys = None if key is None else jax.random.split(key, layers.depth)
        params = stacking.split(layers.layers)[1]
        unit = jax.checkpoint(
            lambda x, xs: layers.unit(context)(x, None, *xs)[0], prevent_cse=False
        )
        xs = layers.by_period((params, keys, jnp.arange(layers.depth)))
        return jax.lax.scan(lambda x, xs: (unit(x, xs), None), x, xs)[0]

    def spared(params: Params, batch: Batch, key: jax.Array | None):
        with running(runner):
            return loss(params, batch, key)

    return spared


def _reads(function: Callable, params: Flat) -> set[str]:
    """Paths of the parameters that what a function gives depends on."""
    jaxpr = jax.make_jaxpr(function)(params).jaxpr
    needed = {v for v in jaxpr.outvars if isinstance(v, Var)}
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed |= {v for v in equation.invars if isinstance(v, Var)}
    return {path for path, v in zip(flatten(params), jaxpr.invars, strict=True) if v in needed}


def _rest(grads: Flat, flat: Flat, own: dict[str, Any], update: _Update) -> None:
    """Updates what stands outside the stacks: puts it into flat and own."""
    params, states = ({path: tree[path] for path in grads} for tree in (flat, own))
    params, states, update.norms = update(params, states, grads, update.norms)
    flat |= params
    own |= states


def _backward(stage: Stage, g_y: jax.Array, flat: Flat, own: dict[str, Any], update: _Update):
    """From the last layer to the first; puts the new parameters and states into flat and own.

    Returns:
      The cotangents of (x, shared).
    """
    layers, prefix = stage.layers, stage.layers.path + "/"
    stacks = _of_stack(layers, flat)
    trained = {path for path in stacks if prefix + path in update.rules}
    fixed = {path: p for path, p in stacks.items() if path not in trained}
    count = layers.depth // layers.period

    def one(i, carry):
        g, g_shared, norms, params, states = carry
        now = layers.by_period(fixed | {path: params[prefix + path] for path in trained})
        # Parameters are read before any is written: else XLA keeps copies of whole stacks.
        now, x, (keys, numbers) = jax.lax.optimization_barrier(
            _at((now, stage.inputs, stage.keys), count - 1 - i)
        )

        def apply(own, x, shared):
            unit = layers.unit(_with(stage.context, shared))
            return unit(x, None, whole(own, unflatten(now)), keys, numbers)[0]

        _, pull = jax.vjp(apply, trainable(unflatten(now), trained), x, stage.shared)
        grads, g, more = pull(g)
        grads = {prefix + path: d for path, d in flatten(grads).items()}
        params, states, norms = update(params, states, grads, norms, numbers)
        return g, jax.tree.map(jnp.add, g_shared, more), norms, params, states

    zeros = jax.tree.map(jnp.zeros_like, stage.shared)
    params, states = (
        {prefix + path: tree[prefix + path] for path in trained} for tree in (flat, own)
    )
    g_x, g_shared, update.norms, params, states = jax.lax.fori_loop(
        0, count, one, (g_y, zeros, update.norms, params, states)
    )
    flat |= params
    own |= states
    return g_x, g_shared


class _Update:
    """New parameters and states from gradients, one array after the other, in place.

    rules: of the tensors that are trained, by path.
    norms: squares, summed over what has been updated so far, of gradients (before clipping) and
      of changes, float32 [2]. Where there is a guard nothing is updated from where the first is not
      finite: so it begins where the update is not ``allowed``.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Built,
        count: jax.Array,
        parts: int,
        allowed: jax.Array | None = None,
    ):
        self.tensors, self.rules, self.seed = model.tensors, optimizer.rules, optimizer.seed
        self.count = count
        self.clip = None if optimizer.clip is None else optimizer.clip / parts**0.5
        self.guarded = allowed is not None
        first = jnp.float32(0) if allowed is None else jnp.where(allowed, 0.0, jnp.nan)
        self.norms = jnp.stack([first, jnp.float32(0)])

    def __call__(
        self,
        params: Flat,
        states: dict[str, Any],
        grads: Flat,
        norms: jax.Array,
        numbers: jax.Array | None = None,
    ):
        """(params, states, norms) after the update of a part of the model.

        Args:
          params: by path; of stacked ones all layers.
          states: by path, likewise.
          grads: by path, of this part; of stacked ones [layers, ...], of these layers alone.
          norms: before.
          numbers: of the layers, int32 [layers]; None for what is not stacked.
        """
        scale = jnp.float32(1)
        if self.clip is not None:
            grads = jax.lax.optimization_barrier(grads)
            square = _square(grads)
            scale = jnp.minimum(1.0, self.clip / jnp.sqrt(square))
            norms = norms.at[0].add(square)
        params, states = dict(params), dict(states)
        # The backward pass comes to the MLP first, which stands last.
        for paths in reversed(list(units(self.rules, grads))):
            rule, tensor = self.rules[paths[0]], self.tensors[paths[0]]
            keys, row = keys_of(paths[0], tensor, self.seed), one_layer(tensor)
            # In turn: nothing of this update has to be there before the one that precedes it is
            # done.
            grad, norms, at = jax.lax.optimization_barrier((gathered(grads, paths), norms, numbers))
            if self.clip is None:
                norms = norms.at[0].add(_square(grad))
            good = jnp.isfinite(norms[0]) if self.guarded else None
            pair = gathered(params, paths), gathered(states, paths)
            if numbers is None:  # as a stack of one
                keys, pair, grad = keys[None], *jax.tree.map(lambda a: a[None], (pair, grad))
            for i, layer in enumerate([0] if at is None else at):
                one = jax.tree.map(lambda g, i=i: g[i], grad)
                pair, more = update_in_place(
                    rule, row, pair, one, scale, self.count, keys[layer], layer, good
                )
                norms = norms.at[1].add(more)
            if numbers is None:
                pair = jax.tree.map(lambda a: a[0], pair)
            params |= scattered(paths, pair[0])
            states |= scattered(paths, pair[1])
        return params, states, norms


def _at(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _square(tree: Any) -> jax.Array:
    """Of the norm."""
    return optax.tree.norm(jax.tree.map(lambda a: a.astype(jnp.float32), tree), squared=True)


def _with(context: Any, shared: tuple) -> Any:
    bias, encoded = shared
    return dataclasses.replace(context, bias=bias, encoded=encoded)


def _of_stack(layers: Layers, flat: Flat) -> Flat:
    """The parameters of a stack's layers, by their paths below it."""
    prefix = layers.path + "/"
    return {path.removeprefix(prefix): p for path, p in flat.items() if path.startswith(prefix)}


def _states(opt_state: ByTensor, params: Params) -> dict[str, Any]:
    """Path of a parameter -> its state."""
    tree = jax.tree.structure(params)
    return dict(zip(flatten(params), tree.flatten_up_to(opt_state.states), strict=True))
