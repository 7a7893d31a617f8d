"""``jaxpt merge``: one model of the checkpoints of several runs, or of one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxpt import examine
from jaxpt.checkpoint import Checkpoints
from jaxpt.errors import ConfigError, Exit
from jaxpt.evaluation import mean_loss
from jaxpt.files import dumps
from jaxpt.folder import RunFolder
from jaxpt.growth import merge
from jaxpt.interop.hf import appearing
from jaxpt.loading import Loaded, load
from jaxpt.optimizers.adamw import AdamW
from jaxpt.optimizers.base import Optimizer
from jaxpt.run import Run, check, to_json
from jaxpt.state import Params
from jaxpt.train import Progress, use_compilation_cache


def main(
    out: Path,
    *,
    uniform: Sequence[str] = (),
    greedy: Sequence[str] = (),
    task_arithmetic: Sequence[str] = (),
    scale: float = 1.0,
    by: str | None = None,
    json: bool = False,
) -> int:
    """Writes a run's folder with one checkpoint, for ``eval``, ``generate``, ``export`` and
    ``Run.start_from``: a run of one phase that has not begun, that of the first model.

    Args:
      out: a folder that is not there.
      uniform, greedy, task_arithmetic: RUN or RUN@STEP each, of one of the three; the parameters
        that are meant for evaluation. Of the last the first is the base.
      scale: of task arithmetic.
      by: NAME/FIGURE that the greedy soup is to raise; None: the mean loss, to lower.
      json: print one JSON object.

    Raises:
      ConfigError: not one kind of merge, no such checkpoint, or models that do not fit. Nothing was
        written.
    """
    given = {"--uniform": uniform, "--greedy": greedy, "--task-arithmetic": task_arithmetic}
    chosen = [name for name, runs in given.items() if runs]
    if len(chosen) != 1:
        raise ConfigError(
            chosen[0] if chosen else "--uniform", f"give one of {', '.join(given)}, and its runs"
        )
    if chosen == ["--task-arithmetic"] and len(task_arithmetic) < 2:
        raise ConfigError("--task-arithmetic", "give a base, and what was made of it")
    out = out.absolute()
    if out.exists():
        raise ConfigError("OUT", f"{out} is there already; give a folder that is not")
    use_compilation_cache()
    runs = given[chosen[0]]
    try:
        params, used, first = _merged(chosen[0], runs, scale, by)
    except ConfigError as error:
        field = error.field
        if field.startswith("states."):
            field = f"{chosen[0]} {runs[int(field.rpartition('.')[2])]}"
        raise ConfigError(field, error.message) from None
    write(out, first, params)
    said = {"folder": str(out), "merge": chosen[0].removeprefix("--"), "of": used}
    print(dumps(said) if json else f"{said['merge']} of {', '.join(used)}: {out}")
    return Exit.OK


def _merged(
    kind: str, runs: Sequence[str], scale: float, by: str | None
) -> tuple[Params, list[str], Loaded]:
    """(parameters, which runs are in them, the first run)."""
    loaded = [opened(runs[0])]
    layout = loaded[0].program.layout
    loaded += [opened(name, layout) for name in runs[1:]]
    first = loaded[0]
    for name, other in zip(runs, loaded, strict=True):
        if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ConfigError(f"{kind} {name}", "its tokenizer is not the first run's")
    states = [each.params for each in loaded]
    with layout.active():
        if kind == "--uniform":
            return jax.jit(merge.uniform)(states), list(runs), first
        if kind == "--task-arithmetic":
            merged = jax.jit(functools.partial(merge.task_arithmetic, scale=scale))
            return merged(states[0], states[1:]), list(runs), first
    program = first.program
    batches = first.run.evaluate.batches
    validations = program.validations(first.tokenizer, batches)

    def score(params: Params) -> float:
        results = examine.losses(dataclasses.replace(first, params=params), validations)
        if by is None:
            return -mean_loss(results)
        name, _, figure = by.rpartition("/")
        if figure not in results.get(name, {}):
            known = ", ".join(f"{task}/{f}" for task, found in results.items() for f in found)
            raise ConfigError("--by", f"no figure {by!r}; there are: {known}")
        return results[name][figure]

    params, kept = merge.greedy_soup(states, score)
    return params, [runs[i] for i in kept], first


def opened(name: str, layout=None) -> Loaded:
    """The run that RUN or RUN@STEP names."""
    folder, at, step = name.rpartition("@")
    if at and step.isdecimal():
        return load(folder, int(step), layout=layout)
    return load(name, layout=layout)


def write(out: Path, loaded: Loaded, params: Params) -> None:
    """A folder with these parameters: it is whole, or not there."""
    run = check(unbegun(loaded))
    with appearing(out) as folder:
        home = RunFolder(folder)
        loaded.tokenizer.save(home.saved_tokenizer)
        with Checkpoints(home.checkpoints, run_config=to_json(run)) as checkpoints:
            checkpoints.save(0, {"params": params}, dataclasses.asdict(Progress()))
        home.config.write_text(to_json(run), encoding="utf-8")


def unbegun(loaded: Loaded) -> Run:
    """The run's phase by itself, around parameters that are there."""
    run, phase = loaded.run, loaded.program.phase
    optimizer = phase.optimizer
    if type(optimizer).eval_params is not Optimizer.eval_params:
        optimizer = AdamW()  # the parameters are those to evaluate with already
    phase = dataclasses.replace(phase, model=None, begin=(), updates=(), optimizer=optimizer)
    model = run.model_of(loaded.program.index)
    return dataclasses.replace(run, model=model, phases=(phase,), start_from=None)
