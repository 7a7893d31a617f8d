"""A trained run from its folder: model, parameters and tokenizer, without the optimizer's state."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import types
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxpt.checkpoint import Checkpoints
from jaxpt.data.encoding import Tokenizer
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError, DataError
from jaxpt.folder import RunFolder
from jaxpt.generator import Generator
from jaxpt.growth.base import Update
from jaxpt.mesh import Layout, single
from jaxpt.optimizers.base import Optimizer
from jaxpt.program import Program
from jaxpt.restoring import restored
from jaxpt.run import Phase, Run
from jaxpt.scoring import Scorer
from jaxpt.state import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A run at one of its checkpoints.

    program: of the phase that the checkpoint was taken in.
    params: nested dict of arrays, as the optimizer and the updates mean them to be evaluated.
    step: optimizer steps over all phases.
    notes: what is not as one might expect, one line each, for the user to see.
    """

    folder: Path
    program: Program
    params: Params
    tokenizer: Tokenizer
    step: int
    notes: tuple[str, ...] = ()

    @property
    def run(self) -> Run:
        return self.program.run

    def generator(self) -> Generator:
        """Writes with these parameters; see ``jaxpt.generate.generate`` for texts."""
        program = self.program
        return Generator(program.model, self.params, program.vocabulary, program.layout)

    def scorer(self, batch: int = 16) -> Scorer:
        """Scores answers with these parameters, ``batch`` at a time."""
        program = self.program
        return Scorer(program.model, self.params, program.vocabulary, program.layout, batch)


def load(
    folder: str | Path,
    step: int | None = None,
    config_module: types.ModuleType | None = None,
    *,
    run: Run | None = None,
    layout: Layout | None = None,
) -> Loaded:
    """The run in a folder, at a checkpoint.

    Parameters alone are read, except where the optimizer or an update has others to evaluate with
    (an average, say), which are in the rest of the state.

    Args:
      folder: the run's folder.
      step: of the checkpoint; None: the latest.
      config_module: the user's config file as a module (``jaxpt.run.load_with_module``), where
        it has classes of its own.
      run: the folder's run, where it is at hand; its mesh may differ from the one trained on.
      layout: where parameters go; None: the run's mesh, or one device where that does not fit.

    Raises:
      ConfigError: the folder holds no run, no checkpoint, or not that step.
      DataError: a checkpoint that does not fit the run.
    """
    home = RunFolder(Path(folder))
    run = home.load(config_module) if run is None else run
    tokenizer = home.tokenizer()
    notes: list[str] = []
    if layout is None:
        layout, note = _layout(run)
        notes += note
    if not home.checkpoints.is_dir():
        raise ConfigError("checkpoint", f"{home.path} holds no checkpoint")
    with quiet(), Checkpoints(home.checkpoints, read_only=True) as checkpoints:
        read = functools.partial(_read, run, tokenizer.vocabulary, layout, checkpoints)
        if step is None:
            found, damaged = checkpoints.newest(lambda step: (step, *read(step)))
            notes += [f"checkpoint {bad} is damaged: {cause}" for bad, cause in damaged.items()]
        else:
            found = (step, *read(_known(checkpoints, step, home.path)))
        if found is None:
            raise ConfigError("checkpoint", f"{home.path} holds no checkpoint")
    step, program, params = found
    return Loaded(home.path, program, params, tokenizer, step, tuple(notes))


def _read(
    run: Run, vocabulary: Vocabulary, layout: Layout, checkpoints: Checkpoints, step: int
) -> tuple[Program, Params]:
    progress = checkpoints.progress(step)
    if progress["phase"] >= len(run.phases):
        raise DataError(f"{checkpoints.folder / str(step)} is of a phase that the run lacks")
    program = Program(run, progress["phase"], vocabulary, layout, progress["schedule_start"])
    if _needs_state(program.phase):
        return program, program.eval_params(restored(checkpoints, step, program))
    wanted = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        program.model.abstract(),
        program.model.shardings(layout),
    )
    return program, checkpoints.restore_params(step, wanted)


def _needs_state(phase: Phase) -> bool:
    """Whether the parameters to evaluate are made of more of the state than the parameters."""
    plain = (Optimizer.eval_params, Update.eval_params)
    return any(type(own).eval_params not in plain for own in (phase.optimizer, *phase.updates))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """orbax warns that a folder opened for reading is read-only."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _layout(run: Run) -> tuple[Layout, list[str]]:
    try:
        layout = run.mesh.build()
    except ConfigError as error:
        return single(), [f"the run's mesh does not fit here ({error.message}); using one device"]
    return layout, []


def _known(checkpoints: Checkpoints, step: int, folder: Path) -> int:
    steps = checkpoints.steps()
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise ConfigError("checkpoint", f"{folder} has none of step {step}; it has: {known}")
    return step
