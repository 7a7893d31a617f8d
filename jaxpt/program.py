"""One phase of a run, built: model, objective, optimizer and compiled steps for a mesh.

Training, evaluation, generation and benchmarks all start from here. Building touches no
device; compiling does, and happens once, on first use.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpt import checks
from jaxpt.data.base import Split
from jaxpt.data.device import (
    DeviceBatches,
    Prepare,
    all_ended,
    device_batches,
    whole_to_device,
)
from jaxpt.data.loader import Loader, build_loader
from jaxpt.data.tokenizers import Tokenizer
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.duration import Duration, as_duration
from jaxpt.evaluation import Validation
from jaxpt.guard import NAME as GUARD
from jaxpt.mesh import Layout
from jaxpt.models.model import Model
from jaxpt.objectives.base import Batch, Features
from jaxpt.run import Phase, Run
from jaxpt.state import Params, TrainState
from jaxpt.steps import (
    Compiled,
    StepFunction,
    batch_shardings,
    compile_eval_step,
    compile_train_step,
    eval_step,
    loss_function,
    state_shardings,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A phase of a run on a mesh.

    ``schedule_start`` is the optimizer's update count at which the phase's schedule begins: 0
    unless the phase goes on with the optimizer state of the phase before.
    """

    run: Run
    index: int
    vocabulary: Vocabulary
    layout: Layout
    schedule_start: int = 0

    @property
    def phase(self) -> Phase:
        return self.run.phases[self.index]

    @functools.cached_property
    def model(self) -> Model:
        return self.run.model_of(self.index).build(self.vocabulary.size)

    @functools.cached_property
    def features(self) -> Features:
        """The host half of the phase's objective."""
        return self.phase.objective.build(
            self.vocabulary, length=self.phase.length, target_length=self.phase.target_length
        )

    # Time.

    def in_steps(self, duration: int | float | Duration) -> int | None:
        """A duration in steps of this phase; None where it cannot be known beforehand."""
        return as_duration(duration).in_steps(
            tokens_per_step=self.phase.tokens_per_step,
            batch=self.phase.batch,
            phase_steps=self.phase.total_steps,
        )

    @functools.cached_property
    def learning_rate(self):
        """Step of the phase -> learning rate, traceable."""
        return self.phase.optimizer.learning_rate(self.phase.total_steps, self.in_steps)

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of a train step: see ``Model.train_flops``."""
        phase = self.phase
        return self.model.train_flops(phase.batch, phase.length, phase.target_length)

    def check(self, before: Program | None = None, start: Model | None = None) -> None:
        """Builds all that needs no device, so that what cannot work is said before any work.

        Args:
          before: the program of the phase before, where there is one.
          start: the model whose parameters the run starts from, where there is one.

        Raises:
          ConfigError: with the field, as a user calls it.
        """
        checks.check(self, before, start)

    # State.

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        optimizer, config = self.phase.optimizer, self.run.model_of(self.index)
        scales = config.rate_scales(optimizer, self.vocabulary.size)
        return optimizer.build(
            self.model.tensors, self.learning_rate, start=self.schedule_start, scales=scales
        )

    @functools.cached_property
    def abstract(self) -> TrainState:
        """The state's shapes, types and shardings."""
        state = jax.eval_shape(self._fresh, jax.random.key(0))
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            state,
            state_shardings(state, self.model, self.layout),
        )

    def _fresh(self, key: jax.Array) -> TrainState:
        return self._around(self.model.init(key), key)

    def _around(self, params: Params, key: jax.Array) -> TrainState:
        extra = {
            update.name: update.init(self.model, params, jax.random.fold_in(key, i))
            for i, update in enumerate(self.phase.updates)
        }
        extra |= self.run.guard.init()
        return TrainState(jnp.int32(0), params, self.optimizer.init(params), extra)

    def init(self, key: jax.Array) -> TrainState:
        """A state at step 0, made where it is to lie."""
        with self.layout.active():
            return jax.jit(self._fresh, out_shardings=_shardings(self.abstract))(key)

    def begun(self, params: Params, old: Model, key: jax.Array) -> Params:
        """Parameters of ``old`` after the phase's transitions, in this model's types."""
        for i, transition in enumerate(self.phase.begin):
            params = transition(params, old, self.model, jax.random.fold_in(key, i))
        return jax.tree.map(lambda x, own: x.astype(own.dtype), params, self.model.abstract())

    def start(self, old: Model, params: Params, key: jax.Array) -> TrainState:
        """A state at step 0 around parameters that are there, those of the model ``old``."""

        def start(params: Params) -> TrainState:
            return self._around(self.begun(params, old, key), key)

        with self.layout.active():
            return jax.jit(start, out_shardings=_shardings(self.abstract))(params)

    def follow(self, before: Program, state: TrainState, key: jax.Array) -> TrainState:
        """The state that this phase begins with, made from the last one of the phase before.

        The phase's transitions run in order. Optimizer and extra state are kept where the phase
        keeps the optimizer and the shapes allow it, and are fresh otherwise.
        """

        def begin(state: TrainState) -> TrainState:
            params = self.begun(state.params, before.model, key)
            fresh = self._around(params, key)
            opt_state = fresh.opt_state
            if self.keeps_optimizer(before):
                opt_state = state.opt_state
                for i, transition in enumerate(self.phase.begin):
                    own = jax.random.fold_in(key, i)
                    opt_state = transition.optimizer_state(
                        opt_state, params, self.model, self.optimizer, own
                    )
            extra = {
                name: state.extra[name] if _same(state.extra.get(name), value) else value
                for name, value in fresh.extra.items()
            }
            if GUARD in extra:
                extra[GUARD] = self.run.guard.next_phase(extra[GUARD])
            return TrainState(state.step, params, opt_state, extra)

        with self.layout.active():
            return jax.jit(begin, out_shardings=_shardings(self.abstract))(state)

    def keeps_optimizer(self, before: Program) -> bool:
        """Whether this phase goes on with the optimizer state of the phase before."""
        return self.phase.keep_optimizer and _same(
            before.abstract.opt_state, self.abstract.opt_state
        )

    # Steps.

    @functools.cached_property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a batch, as the loader will give them."""
        phase, extra = self.phase, self.features.extra
        if self.domains:
            extra = (*extra, "domains")
        return abstract_batch(phase.batch, phase.length, phase.target_length, extra)

    @functools.cached_property
    def step_function(self) -> StepFunction:
        """The pure train step."""
        updates = [update.in_phase(self.phase) for update in self.phase.updates]
        return self.phase.step.build(
            self.model,
            self.phase.objective,
            self.optimizer,
            updates,
            self.domains,
            self.run.guard,
        )

    @functools.cached_property
    def train_step(self) -> Compiled:
        return compile_train_step(
            self.step_function, self.abstract, self.abstract_batch, self.layout
        )

    @functools.cached_property
    def eval_step(self) -> Compiled:
        """Compiled for batches of the phase's own size."""
        step = eval_step(loss_function(self.model, self.phase.objective, self.domains))
        return compile_eval_step(step, self.abstract.params, self.abstract_batch, self.layout)

    # Data.

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:
        """Names of the data's domains where it has several; empty where it has one."""
        names = tuple(domain.name for domain in self.phase.data.domains())
        return names if len(names) > 1 else ()

    def loader(
        self, tokenizer: Tokenizer, state: dict[str, Any] | None = None, *, learn: bool = False
    ) -> Loader:
        """The phase's training batches, from their beginning or on from a saved ``state``.

        Args:
          learn: the losses of every step will be observed, for a mixing policy that needs them.
        """
        phase, run = self.phase, self.run
        seed = run.seed if run.data_seed is None else run.data_seed
        loader = build_loader(
            phase.data,
            self.features,
            tokenizer,
            batch=phase.batch,
            length=phase.length,
            target_length=phase.target_length,
            seed=seed + self.index,
            epochs=None if phase.epochs is None else math.ceil(phase.epochs),
            loading=run.loader,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            learn=learn,
        )
        if state is not None:
            loader.restore(state)
        return loader

    def batches(
        self, tokenizer: Tokenizer, state: dict[str, Any] | None = None, *, learn: bool = True
    ) -> DeviceBatches:
        """The phase's training batches on the devices, as ``loader`` makes them; close it when
        done. All processes get the same number of them."""
        loader = self.loader(tokenizer, state, learn=learn)
        agree = all_ended if loader.finite and jax.process_count() > 1 else None
        ahead, prepare = self.run.loader.device_prefetch, self.prepare
        rows = self.batch_shardings if prepare is None else self.layout.sharding(("batch",))
        return device_batches(loader, rows, ahead, agree, prepare)

    @functools.cached_property
    def prepare(self) -> Prepare | None:
        """Makes the step's batch of what ``loader`` gives, once it is on the devices, in rows cut
        like the batch; None where the loader gives the batch."""
        if self.features.prepare is None:
            return None
        return jax.jit(self.features.prepare, out_shardings=self.batch_shardings)

    def validations(
        self, tokenizer: Tokenizer, batches: int, split: Split = "validation"
    ) -> list[Validation]:
        """The same batches every time, of each component of the phase's objective.

        Every process reads them whole: so they do not depend on the number of processes.
        """
        phase = self.phase
        found = []
        for task, name in enumerate(phase.objective.tasks):
            features = phase.objective.only(task).build(
                self.vocabulary, length=phase.length, target_length=phase.target_length
            )
            with build_loader(
                phase.data,
                features,
                tokenizer,
                batch=phase.batch,
                length=phase.length,
                target_length=phase.target_length,
                split=split,
                epochs=1,
                # One shard: the same examples whatever the batch; read here, once.
                loading=dataclasses.replace(self.run.loader, shards=1, workers=0),
            ) as loader:
                found.append(
                    Validation.of(name, itertools.islice(loader, batches), phase.objective.baseline)
                )
        return found

    def eval_params(self, state: TrainState) -> Params:
        """The parameters to evaluate and decode with: the optimizer and the updates have a say."""
        params = self.phase.optimizer.eval_params(state.opt_state, state.params)
        for update in self.phase.updates:
            params = update.eval_params(state, params)
        return params

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """A global host batch, the same in every process, on the devices as the steps expect it."""
        return whole_to_device(batch, self.batch_shardings)

    @functools.cached_property
    def batch_shardings(self) -> dict[str, jax.sharding.NamedSharding]:
        return batch_shardings(self.abstract_batch, self.layout)


def abstract_batch(
    batch: int, length: int, target_length: int | None, extra: tuple[str, ...] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of a batch (see jaxpt/objectives/base.py) as shapes.

    Args:
      batch: rows.
      length: positions of the only stack, or of the encoder.
      target_length: positions of the decoder, None where there is one stack.
      extra: further int32 fields of the decoder's positions.
    """
    decoder = length if target_length is None else target_length
    names = ("tokens", "targets", "segments", "positions", "prefix", "tasks", *extra)
    fields = {name: jax.ShapeDtypeStruct((batch, decoder), np.int32) for name in names}
    fields["weights"] = jax.ShapeDtypeStruct((batch, decoder), np.float32)
    if target_length is not None:
        for name in ("inputs", "input_segments", "input_positions"):
            fields[name] = jax.ShapeDtypeStruct((batch, length), np.int32)
    return fields


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, abstract)


def _same(a: Any, b: Any) -> bool:
    """Whether two pytrees of arrays agree in structure, shapes and types."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(
        x.shape == y.shape and x.dtype == y.dtype
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
