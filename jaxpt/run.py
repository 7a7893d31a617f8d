"""``Run``: one value that holds every choice of a pretraining run, and its phases.

A config file is a Python file with a module-level ``run``:

    from jaxpt.run import Phase, Run
    run = Run(model=Transformer(...), tokenizer=Bytes(), phases=(Phase(steps=1000, ...),))

``load`` reads it, ``override`` changes it from the command line, ``to_json`` and ``from_json``
keep it in the run's folder. Everything that can be wrong in it is found before any device work.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpt.checkpoint import Checkpoint
from jaxpt.config import codec, edit, file, flags, tree
from jaxpt.data.base import Source
from jaxpt.data.loader import Loading
from jaxpt.data.tokenizers import TokenizerConfig
from jaxpt.duration import Duration, Unit, as_duration
from jaxpt.errors import ConfigError
from jaxpt.evaluation import Evaluate
from jaxpt.growth.base import Transition, Update
from jaxpt.guard import Guard
from jaxpt.mesh import MESH_AXES, Mesh
from jaxpt.models.base import ModelConfig, check_outputs
from jaxpt.monitor import Monitor
from jaxpt.objectives.base import Objective
from jaxpt.optimizers.base import Optimizer
from jaxpt.steps import Step

LENGTHS: tuple[Unit, ...] = ("steps", "tokens", "examples", "epochs", "seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with its own length, data, objective, optimizer and batch.

    Give exactly one of steps, tokens, examples, epochs and seconds.
    """

    name: str = "train"  # what this phase is called in metrics and in flags
    steps: int | float | None = None  # length of the phase in optimizer steps
    # length of the phase in positions, all streams together, padding counted
    tokens: int | float | None = None
    examples: int | float | None = None  # length of the phase in rows of a batch
    epochs: int | float | None = None  # length of the phase in passes over each part of its data
    seconds: int | float | None = None  # length of the phase in wall-clock time
    data: Source  # where documents come from
    objective: Objective  # what the model learns to predict
    optimizer: Optimizer  # how parameters change, and the learning rate's schedule
    batch: int  # rows of the global batch of one optimizer step
    length: int  # positions of a row: of the encoder where there is one, else of the only stack
    # positions of a row of the decoder; for encoder-decoders alone
    target_length: int | None = None
    step: Step = dataclasses.field(default_factory=Step)  # how a train step is made
    model: ModelConfig | None = None  # the model from this phase on, where it changes
    begin: tuple[Transition, ...] = ()  # transforms of the state when the phase starts
    updates: tuple[Update, ...] = ()  # transforms of the state inside every step
    keep_optimizer: bool = True  # go on with the optimizer state of the phase before

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", str(self.name)):
            raise ConfigError(
                "name", f"{self.name!r} is not valid; use letters, digits and _, a letter first"
            )
        given = [unit for unit in LENGTHS if getattr(self, unit) is not None]
        if len(given) != 1:
            got = f"got {' and '.join(given)}" if given else "got none"
            raise ConfigError(
                given[0] if given else "steps", f"give exactly one of {', '.join(LENGTHS)}; {got}"
            )
        for name in (
            *given,
            "batch",
            "length",
            *(["target_length"] if self.target_length is not None else []),
        ):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise ConfigError(name, f"{value} is not valid; give more than 0")
        if (
            self.steps is not None
            and isinstance(self.steps, int | float)
            and self.steps != int(self.steps)
        ):
            raise ConfigError("steps", f"{self.steps} is not valid; give a whole number")

    @property
    def duration(self) -> Duration:
        """The phase's own length."""
        unit: Unit = next(unit for unit in LENGTHS if getattr(self, unit) is not None)
        return Duration(getattr(self, unit), unit)

    @property
    def tokens_per_step(self) -> int:
        """Positions of one batch, both streams together, padding counted."""
        return self.batch * (self.length + (self.target_length or 0))

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the phase; None where only its end will tell (epochs, seconds)."""
        return self.duration.in_steps(
            tokens_per_step=self.tokens_per_step, batch=self.batch, phase_steps=None
        )

    def in_steps(self, duration: int | float | Duration) -> int | None:
        """A duration inside this phase in its optimizer steps; None where that cannot be known."""
        return as_duration(duration).in_steps(
            tokens_per_step=self.tokens_per_step, batch=self.batch, phase_steps=self.total_steps
        )

    def validate(self, model: ModelConfig) -> None:
        """Holds the phase against the model that it trains. Raises ConfigError."""
        if model.kind == "encoder_decoder" and self.target_length is None:
            raise ConfigError(
                "target_length", "an encoder-decoder needs it: positions of a row of the decoder"
            )
        if model.kind != "encoder_decoder" and self.target_length is not None:
            raise ConfigError(
                "target_length",
                f"only an encoder-decoder has targets of their own; this is {model.kind}",
            )
        if model.kind == "encoder" and not self.objective.in_place:
            name = type(self.objective).__name__
            raise ConfigError(
                "objective",
                f"an encoder sees both ways, and would read the targets of {name} ahead; use "
                "MaskedLM, or model.kind decoder or encoder_decoder",
            )
        check_outputs(self.objective.outputs, self.objective, model)
        self.objective.check(self.data, model)
        if self.batch % self.step.accumulate:
            raise ConfigError(
                "batch",
                f"{self.batch} is not a multiple of step.accumulate = {self.step.accumulate}",
            )
        try:
            self.optimizer.learning_rate(self.total_steps, self.in_steps)
        except ConfigError as error:
            raise error.within("optimizer") from None
        for i, update in enumerate(self.updates):
            try:
                update.validate(self)
            except ConfigError as error:
                raise error.within(f"updates.{i}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run is: what ``jaxpt train`` does follows from this value alone."""

    model: ModelConfig  # the network, or several
    phases: tuple[Phase, ...]  # what is done with it, in order
    tokenizer: TokenizerConfig  # text to ids and back
    # how devices share the work
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    # when to save, and what to keep
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    # when to measure the validation loss, and on how much
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    # what is written down and shown
    monitor: Monitor = dataclasses.field(default_factory=Monitor)
    # what is done about losses and gradients that cannot be right
    guard: Guard = dataclasses.field(default_factory=Guard)
    # how batches are made
    loader: Loading = dataclasses.field(default_factory=Loading)
    # folder of a run, of an imported model or of Hugging Face, whose parameters it starts from
    start_from: str | None = None
    seed: int = 0  # gives initialisation, data order, denoising and dropout, each its own key
    init_seed: int | None = None  # initialisation alone; None: from seed
    data_seed: int | None = None  # data order and denoising alone; None: from seed
    # the same numbers in every run, bit for bit, on GPUs, too: slower there, and to be known before
    # JAX starts
    deterministic: bool = False

    def __post_init__(self):
        if not self.phases:
            raise ConfigError("phases", "a run has at least one phase")
        found = [phase.name for phase in self.phases if isinstance(phase, Phase)]
        for name in found:
            if found.count(name) > 1:
                raise ConfigError("phases", f"two phases are called {name!r}; names must differ")
        for name in ("seed", "init_seed", "data_seed"):
            value = getattr(self, name)
            if isinstance(value, int) and not 0 <= value < 2**32:
                raise ConfigError(name, f"{value} is not valid; give 0 to {2**32 - 1}")

    def model_of(self, index: int) -> ModelConfig:
        """The model that phase ``index`` trains: the last that was set up to there."""
        return tree.get(self, self._model_path(index))

    def _model_path(self, index: int) -> str:
        changed = [i for i in range(index + 1) if self.phases[i].model is not None]
        return f"phases.{changed[-1]}.model" if changed else "model"

    def _renamed(self, error: ConfigError, parent: str = "") -> ConfigError:
        """The error with its field called as the user calls it."""
        return ConfigError(self.name_of(error.within(parent).field), error.message)

    def validate(self, devices: int | None = None) -> Run:
        """Checks what single fields cannot tell; returns the run.

        Args:
          devices: how many devices there will be, where that is known: then the mesh and the
            batch are held against them too.

        Raises:
          ConfigError: an impossible combination, with the field and what is valid.
        """
        for index, phase in enumerate(self.phases):
            model = self.model_of(index)
            phase.step.validate(self.guard)
            try:
                phase.validate(model)
            except ConfigError as error:
                raise self._renamed(error, f"phases.{index}") from None
            try:
                model.validate(phase.length, phase.target_length)
            except ConfigError as error:
                raise self._renamed(error, self._model_path(index)) from None
        if devices is not None:
            self._validate_mesh(devices)
        return self

    def _validate_mesh(self, devices: int) -> None:
        sizes = self.mesh.sizes(devices)
        axes: dict[str, int] = dict(zip(MESH_AXES, sizes, strict=True))
        table = self.mesh.table
        for index, phase in enumerate(self.phases):
            lengths = {"length": phase.length, "target_length": phase.target_length}
            cuts = [("batch", "batch", phase.batch, phase.step.accumulate)]
            for axis in ("length", "residual"):
                cuts += [(name, axis, n, 1) for name, n in lengths.items() if n is not None]
            for name, logical, size, parts in cuts:
                over = [axis for axis in table[logical] if axes[axis] > 1]
                ways = parts
                for axis in over:
                    ways *= axes[axis]
                if size % ways:
                    each = " x ".join(
                        [f"mesh.{a} = {axes[a]}" for a in over]
                        + [f"step.accumulate = {parts}"] * (parts > 1)
                    )
                    raise ConfigError(
                        self.name_of(f"phases.{index}.{name}"),
                        f"{size} cannot be cut equally over {each}; give a multiple of {ways}",
                    )

    def replace(self, **changes: Any) -> Run:
        """A copy with some fields changed, named as on the command line.

        ``base.replace(**{"model.width": 64, "steps": 40})``. In a run of one phase its fields
        need no phase's name; else ``phases.NAME.steps``. A new length takes the place of the old
        one, whatever its unit.

        Raises:
          ConfigError: an unknown field, a wrong type, or what the dataclasses say to the values.
        """
        return replace(self, changes)

    def name_of(self, path: str) -> str:
        """How a user calls the field at ``phases.INDEX.FIELD``; other paths are as they are."""
        match = re.fullmatch(r"phases\.(\d+)(?:\.(.*))?", path)
        if match is None or int(match.group(1)) >= len(self.phases):
            return path
        field = match.group(2)
        if field and len(self.phases) == 1 and field.split(".")[0] not in _RUN_FIELDS:
            return field
        return f"phases.{self.phases[int(match.group(1))].name}{'.' + field if field else ''}"

    def path_of(self, name: str) -> str:
        """The inverse of ``name_of``: a phase by its name or index, or its field without any."""
        head, _, rest = name.partition(".")
        if head == "phases" and rest:
            which, _, field = rest.partition(".")
            found = [str(i) for i, phase in enumerate(self.phases) if which in (phase.name, str(i))]
            if not found:
                raise ConfigError(
                    f"phases.{which}",
                    f"no such phase; phases: {', '.join(p.name for p in self.phases)}",
                )
            return f"phases.{found[0]}{'.' + field if field else ''}"
        if len(self.phases) == 1 and head not in _RUN_FIELDS and head in _PHASE_FIELDS:
            return f"phases.0.{name}"
        return name


_RUN_FIELDS = tuple(f.name for f in dataclasses.fields(Run))
_PHASE_FIELDS = tuple(f.name for f in dataclasses.fields(Phase))


def check(run: Run) -> Run:
    """Strict types everywhere, and ``validate``. Returns the run; raises ConfigError."""
    try:
        codec.check(run)
    except ConfigError as error:
        raise run._renamed(error) from None
    return run.validate()


def replace(run: Run, changes: Mapping[str, Any]) -> Run:
    """``run.replace(**changes)``."""
    paths: dict[str, Any] = {}
    for name, value in changes.items():
        path = run.path_of(name)
        if path.split(".")[0] not in _RUN_FIELDS:
            raise tree.no_field(name, flags.names(_fields(run)))
        paths[path] = value
    for index in range(len(run.phases)):
        lengths = {f"phases.{index}.{unit}": None for unit in LENGTHS}
        if any(paths.get(path) is not None for path in lengths):
            paths = lengths | paths
    try:
        return check(edit.replace(run, paths))
    except ConfigError as error:
        raise run._renamed(error) from None


def load(path: str | Path) -> Run:
    """The run of a config file, checked. Raises ConfigError, or what the file's own code raises."""
    return load_with_module(path)[0]


def load_with_module(path: str | Path) -> tuple[Run, types.ModuleType]:
    """``load``, and the file as a module, which ``from_json`` needs for the file's own classes."""
    module = file.load_module(path)
    return check(file.run_of(module, path, Run)), module


def to_json(run: Run) -> str:
    """The run as the text of ``config.json``; ``from_json`` gives an equal value."""
    return codec.to_json(run)


def from_json(text: str, config_module: types.ModuleType | None = None) -> Run:
    """The run that ``to_json`` wrote.

    Args:
      text: the text of ``config.json``.
      config_module: the user's config file (``load_with_module``), for classes of its own.

    Raises:
      ConfigError: no such run; see ``jaxpt.config.codec``.
    """
    return codec.from_json(text, Run, config_module).validate()


def override(
    run: Run,
    args: Sequence[str],
    *,
    prog: str = "jaxpt train CONFIG",
    extra: Sequence[flags.Entry] = (),
    only: Sequence[str] | None = None,
) -> tuple[Run, dict[str, Any]]:
    """The run with the flags of a command line applied, and the values of ``extra`` flags.

    ``--help`` prints every field with its default and its meaning, and exits.

    Args:
      run: what to change.
      args: the command line.
      prog: the program's name, for ``--help``.
      extra: flags beside those of the run (which they must not be called like).
      only: where given, the only fields that may be changed.

    Returns:
      (run, {name: value of each extra flag, given or not}).

    Raises:
      ConfigError: an unknown or ill-typed flag, or an impossible combination.
    """
    args = [_without_phase(run, arg) for arg in args]
    fields = [entry for entry in _fields(run) if only is None or entry.name in only]
    given = flags.parse([*extra, *fields], args, prog=prog, description=_HELP)
    options = {entry.name: given.pop(entry.name, entry.value) for entry in extra}
    return (replace(run, given) if given else run), options


def _without_phase(run: Run, arg: str) -> str:
    """``--phases.NAME.steps`` as ``--steps`` where there is one phase: both are understood."""
    name, equals, value = arg.partition("=")
    if not name.startswith("--phases.") or len(run.phases) > 1:
        return arg
    return f"--{run.name_of(run.path_of(name[2:]))}{equals}{value}"


_HELP = (
    "Every field of the run, with the config's own value as its default. A duration is written as "
    "100 (steps), 5e9tokens, 2epochs, 600seconds or 5%."
)


def _fields(run: Run) -> list[flags.Entry]:
    """The run as the command line shows it: a single phase's fields stand among the run's own."""
    own = [entry for entry in flags.entries(run) if entry.name != "phases"]
    if len(run.phases) == 1:
        return [e for e in flags.entries(run.phases[0]) if e.name not in _RUN_FIELDS] + own
    phases = tuple(flags.Entry(phase.name, Phase, phase) for phase in run.phases)
    return [*own, flags.Entry("phases", tuple, flags.Group("The phases, in order.", phases))]
