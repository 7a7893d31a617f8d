"""What a run starts from where that is not a fresh model: ``Run.start_from``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from jaxpt.checkpoint import Checkpoints
from jaxpt.errors import ConfigError
from jaxpt.folder import RunFolder
from jaxpt.interop import hf
from jaxpt.loading import load, quiet
from jaxpt.mesh import Layout
from jaxpt.models import stacking
from jaxpt.models.base import ModelConfig
from jaxpt.models.model import Model
from jaxpt.models.transformer import Transformer
from jaxpt.program import Program
from jaxpt.run import Run
from jaxpt.state import Params, TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """Parameters that are there. Making it has read none.

    model: whose they are, with its layers stacked as the run's model has them.
    read: where they are to lie -> the parameters.
    """

    model: Model
    read: Callable[[Layout], Params]

    def state(self, program: Program, key: jax.Array) -> TrainState:
        """The state that the run's first phase begins with."""
        return program.start(self.model, self.read(program.layout), key)


def open_start(run: Run, home: RunFolder) -> Start | None:
    """What a run begins with; None for a fresh model, or where its folder has a checkpoint.

    Raises:
      ConfigError: neither a run with a checkpoint nor a model of Hugging Face, or one that is not
        supported.
      DataError: files that are not whole.
    """
    if run.start_from is None or home.has_checkpoint():
        return None
    folder, model = Path(run.start_from).expanduser(), run.model_of(0)
    try:
        if (folder / "checkpoints").is_dir():
            return _of_run(folder, model)
        if (folder / hf.CONFIG).is_file():
            return _of_hugging_face(folder, model)
    except ConfigError as error:
        raise ConfigError("start_from", f"{folder}: {error}") from None
    raise ConfigError("start_from", f"{folder} holds neither a run's checkpoints nor a config.json")


def _of_run(folder: Path, model: ModelConfig) -> Start:
    """The latest checkpoint that can be read, with the parameters to evaluate with."""
    home = RunFolder(folder)
    run, vocabulary = home.load(), home.tokenizer().vocabulary
    with quiet(), Checkpoints(home.checkpoints, read_only=True) as checkpoints:
        found, _ = checkpoints.newest(lambda step: (step, checkpoints.progress(step)["phase"]))
    if found is None:
        raise ConfigError("checkpoint", "it holds none")
    step, phase = found
    old = run.model_of(phase)
    turned = isinstance(old, Transformer) and old.scan != model.stacked
    if turned:
        old = dataclasses.replace(old, scan=model.stacked)

    def read(layout: Layout) -> Params:
        params = load(folder, step, run=run, layout=layout).params
        if turned:
            params = (stacking.stacked if model.stacked else stacking.unstacked)(params)
        return params

    return Start(old.build(vocabulary.size), read)


def _of_hugging_face(folder: Path, model: ModelConfig) -> Start:
    found = hf.read(folder)
    config = found.config
    if isinstance(model, Transformer):  # what changes no function is as the run has it
        scan = model.scan and config.first_norm
        config = dataclasses.replace(
            config, dtype=model.dtype, vocab_multiple=model.vocab_multiple, scan=scan
        )
    own = Model(config, found.vocab_size)

    def read(layout: Layout) -> Params:
        def put(array, sharding):  # each process reads what its devices get
            return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

        return jax.tree.map(put, found.params(config), own.shardings(layout))

    return Start(own, read)
