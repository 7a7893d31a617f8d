"""What can be wrong in a phase and is found before any device works."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax

from jaxpt.data.mixing.mixer import check_learning
from jaxpt.errors import ConfigError
from jaxpt.models.model import Model
from jaxpt.steps import eval_step, loss_function

if TYPE_CHECKING:
    from jaxpt.program import Program


def check(program: Program, before: Program | None, start: Model | None) -> None:
    """``Program.check``."""
    try:
        _ = program.features, program.optimizer, program.step_function
        check_learning(program.phase.data.mixing(), program.run.loader)
        program.model.shardings(program.layout)
        _check_losses(program)
        _check_needs(program)
        if before is None and start is not None:
            _check_start(program, start)
        else:
            _check_change(program, before.model if before else program.model)
    except ConfigError as error:
        own = {field.name for field in dataclasses.fields(program.phase)}
        if error.field.split(".")[0] in own:
            field = program.run.name_of(f"phases.{program.index}.{error.field}")
            raise ConfigError(field, error.message) from None
        raise


def _check_needs(program: Program) -> None:
    """Whether the model has all that the objective's examples ask for."""
    for field, least in program.features.needs.items():
        have = getattr(program.model.config, field, 0)
        if have < least:
            raise ConfigError(
                "objective",
                f"{type(program.phase.objective).__name__} needs model.{field} of {least} or "
                f"more; this model has {have}",
            )


def _check_losses(program: Program) -> None:
    """Whether the step reports what an online mixing policy learns from."""
    phase = program.phase
    policy = phase.data.mixing()
    if not policy.online:
        return
    step = eval_step(loss_function(program.model, phase.objective, program.domains))
    with program.layout.active():
        metrics = jax.eval_shape(step, program.abstract.params, program.abstract_batch)
    if f"domain_loss/{program.domains[0]}" not in metrics:
        raise ConfigError(
            "objective",
            f"{type(phase.objective).__name__} does not give the loss of each target "
            f"(Loss.tokens), which {type(policy).__name__} learns from",
        )


def _check_start(program: Program, old: Model) -> None:
    """Whether the model's parameters are those that the run starts from, by name and shape, or the
    phase's transitions lead there."""
    _validate(program, old)
    if program.phase.begin:
        return
    new = program.model
    for path in sorted({*new.tensors, *old.tensors}):
        here, there = (
            f"shape {model.tensors[path].shape}" if path in model.tensors else "nothing"
            for model in (new, old)
        )
        if here != there:
            vocabulary = path in new.tensors and "vocab" in new.tensors[path].axes
            how = "ResizeVocabulary" if vocabulary else "Convert"
            raise ConfigError(
                "start_from",
                f"at {path} it has {there}, and the model {here}; make them equal, or say how it "
                f"changes in the first phase's begin (jaxpt.growth.{how})",
            )


def _check_change(program: Program, old: Model) -> None:
    """Whether the phase's transitions lead from the model before to this one."""
    _validate(program, old)
    new = program.model
    if old.tensors == new.tensors or program.phase.begin:
        return
    changed = [p for p, t in new.tensors.items() if old.tensors.get(p) != t]
    changed += [p for p in old.tensors if p not in new.tensors]
    raise ConfigError(
        "begin",
        f"the model changes ({', '.join(changed[:3])}{', ...' * (len(changed) > 3)}) and no "
        "transition says how; give one of jaxpt.growth",
    )


def _validate(program: Program, old: Model) -> None:
    """What the transitions say to the models."""
    for i, transition in enumerate(program.phase.begin):
        try:
            transition.validate(old, program.model)
        except ConfigError as error:
            raise error.within(f"begin.{i}") from None
