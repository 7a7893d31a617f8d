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
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jaxpt.errors import ConfigError
from jaxpt.growth.base import Update, UpdateFunction, bound
from jaxpt.models.model import Model
from jaxpt.models.stack import Layers, running
from jaxpt.objectives.base import Batch, Objective
from jaxpt.optimizers.base import Built
from jaxpt.optimizers.in_place import update_in_place
from jaxpt.optimizers.rules import ByTensor, keys_of, one_layer
from jaxpt.state import Params, TrainState, flatten, trainable, unflatten, whole
from jaxpt.steps import LossFunction, Metrics, Step, StepFunction, loss_function, token_counts

Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LayerwiseStep(Step):
    """As ``Step``, with no more than one layer's gradient at a time.

    Each layer's gradient is clipped by its own norm, and so is that of the rest: of n parts to
    ``clip`` / sqrt(n), so that the norm of them all is at most ``clip``. (The global norm is not
    known before the last layer has been reached.) With ``clip`` None the losses are those of
    ``Step``.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.accumulate != 1:
            raise ConfigError(
                "accumulate", f"{self.accumulate} is not valid: what is updated at once is not kept"
            )

    def build(
        self,
        model: Model,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        updates: Sequence[Update] = (),
        domains: Sequence[str] = (),
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
        loss, after = loss_function(model, objective, domains), bound(updates, model, optimizer)
        inner = layerwise_step(loss, model, optimizer, after)

        def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
            return inner(state, objective.whole(batch), key)

        return step


@dataclasses.dataclass
class Stage:
    """A stack that has been run.

    inputs: [L / period, B, T, D], of every layer (of the first of a period).
    pull: cotangents of (x, shared) -> those of (rest, outputs of the stacks before).
    """

    layers: Layers
    context: Any
    shared: Any
    keys: Any
    inputs: jax.Array
    pull: Callable


class _Reached(Exception):
    """Ends the tracing of a model at the input of a stack."""


def layerwise_step(
    loss: LossFunction, model: Model, optimizer: Built, updates: Sequence[UpdateFunction] = ()
) -> StepFunction:
    """A step of gradient descent on the mean loss of a batch, layer by layer."""
    stacked = {path for path, tensor in model.tensors.items() if tensor.stacked}

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        flat, own = flatten(state.params), _states(state.opt_state, state.params)
        rest = {path: p for path, p in flat.items() if path not in stacked}
        rest = trainable(rest, optimizer.rules)
        stages, sums, pull = _forward(loss, flat, rest, batch, key)
        parts = 1 + sum(stage.layers.depth // stage.layers.period for stage in stages)
        update = _Update(model, optimizer, state.opt_state.count, parts)
        g_rest, g_outputs = pull(1 / jnp.maximum(sums.count, 1).astype(sums.total.dtype))
        for stage in reversed(stages):
            g_y, g_outputs = g_outputs[-1], g_outputs[:-1]
            cotangents = _backward(stage, g_y, flat, own, update)
            more_rest, more_outputs = stage.pull(cotangents)
            g_rest, g_outputs = jax.tree.map(
                jnp.add, (g_rest, g_outputs), (more_rest, more_outputs)
            )
        g_rest = {path: g for path, g in g_rest.items() if g is not None}
        params, states = ({path: tree[path] for path in g_rest} for tree in (flat, own))
        params, states, norms = update(params, states, g_rest)
        flat, own, update.norms = flat | params, own | states, update.norms + norms
        tree = jax.tree.structure(state.params)
        states = tree.unflatten(own[path] for path in flatten(state.params))
        opt_state = ByTensor(state.opt_state.count + 1, states)
        result = TrainState(state.step + 1, unflatten(flat), opt_state, state.extra)
        for i, each in enumerate(updates):
            result = each(result, None, jax.random.fold_in(key, i + 1))
        grad_norm, update_norm = jnp.sqrt(update.norms)
        metrics = {
            "loss": (sums.total, sums.count),
            **sums.metrics,
            **token_counts(batch),
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "param_norm": optax.tree.norm(trainable(result.params)),
        }
        return result, metrics

    return step


def _forward(loss: LossFunction, flat: Flat, rest: Any, batch: Batch, key: jax.Array):
    """Runs the model, stack by stack.

    Returns:
      (the stages, the Loss, pull: a cotangent of its total -> those of rest and of the stages'
      outputs).
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

        found, pull, sums = jax.vjp(part, rest, outputs, has_aux=True)
        if sums is not None:
            return stages, sums, pull
        (layers, context, layer_key, _), (x, shared) = reached[-1], found
        keys = None if layer_key is None else jax.random.split(layer_key, layers.depth)
        keys = layers.by_period((keys, jnp.arange(layers.depth)))
        unit = layers.unit(_with(context, shared))

        def body(x, xs, unit=unit):
            return unit(x, None, *xs)[0], x

        params = unflatten(_of_stack(layers, flat))
        y, inputs = jax.lax.scan(body, x, (layers.by_period(params), *keys))
        stages.append(Stage(layers, context, shared, keys, inputs, pull))
        outputs.append(y)


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
        params, states, more_norms = update(params, states, grads, numbers)
        return g, jax.tree.map(jnp.add, g_shared, more), norms + more_norms, params, states

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
      of changes, float32 [2].
    """

    def __init__(self, model: Model, optimizer: Built, count: jax.Array, parts: int):
        self.tensors, self.rules, self.seed = model.tensors, optimizer.rules, optimizer.seed
        self.count = count
        self.clip = None if optimizer.clip is None else optimizer.clip / parts**0.5
        self.norms = jnp.zeros(2, jnp.float32)

    def __call__(self, params: Flat, states: dict[str, Any], grads: Flat, numbers: Any = None):
        """(params, states, norms) after the update of a part of the model.

        Args:
          params: by path; of stacked ones all layers.
          states: by path, likewise.
          grads: by path, of this part; of stacked ones [layers, ...], of these layers alone.
          numbers: of the layers, int32 [layers]; None for what is not stacked.
        """
        square = optax.tree.norm(grads, squared=True).astype(jnp.float32)
        if self.clip is not None:
            clip = optax.clip_by_global_norm(self.clip)
            grads = cast(Flat, clip.update(grads, optax.EmptyState())[0])
        params, states, changed = dict(params), dict(states), jnp.float32(0)
        for path, grad in grads.items():
            keys, row = keys_of(path, self.tensors[path], self.seed), one_layer(self.tensors[path])
            pair = params[path], states[path]
            if numbers is None:  # as a stack of one
                keys, pair, grad = keys[None], *jax.tree.map(lambda a: a[None], (pair, grad))
            for i, layer in enumerate([0] if numbers is None else numbers):
                pair, more = update_in_place(
                    self.rules[path], row, pair, grad[i], self.count, keys[layer], layer
                )
                changed += more
            if numbers is None:
                pair = jax.tree.map(lambda a: a[0], pair)
            params[path], states[path] = pair
        return params, states, jnp.stack([square, changed])


def _at(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


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
