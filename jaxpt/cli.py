"""The ``jaxpt`` command: reads the command line, loads the run, and calls the command's module.

Each command's work lives in the ``main`` of its own module, which is imported when it is called:
``jaxpt --help`` imports nothing but the standard library.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import os
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpt import __version__
from jaxpt.cli_flags import (
    BenchFlags,
    BuildFlags,
    CleanCheckpointsFlags,
    DoctorFlags,
    EvalFlags,
    ExportFlags,
    GenerateFlags,
    ImportFlags,
    LaunchFlags,
    ListCheckpointsFlags,
    MergeFlags,
    PlanFlags,
    ShowFlags,
    TrainFlags,
    VerifyCheckpointsFlags,
    VerifyFlags,
)
from jaxpt.errors import ConfigError, Exit, complain, exit_code

if TYPE_CHECKING:
    from jaxpt.run import Run


def _train(args: list[str]) -> int | None:
    if args[:1] and args[0].partition("=")[0] == "--from-run":
        return _train_again(args)
    path, rest = _operand(args, "train", "CONFIG")
    run, flags = _configured(path, rest, "train", TrainFlags())
    for name in ("from_run", "config"):
        if flags.pop(name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(flag, "stands in the place of CONFIG: train --from-run DIR")
    workdir = _local(flags.pop("workdir") or Path("runs") / path.stem)
    return _module("train").main(run, workdir=workdir, **flags)


def _train_again(args: list[str]) -> int | None:
    """A run from the folder of another: of its config.json and its tokenizer alone."""
    from jaxpt import environment
    from jaxpt.folder import RunFolder

    folder = Path(_value_of("--from-run", args) or "")
    fields = ("monitor", "checkpoint", "evaluate", "mesh", "deterministic")
    run, flags = _saved(folder, args, "train --from-run", TrainFlags(), fields)
    del flags["from_run"]
    workdir = _local(flags.pop("workdir") or folder.with_name(f"{folder.name}-again"))
    if changes := environment.changes(folder):
        print(f"note: what it was made with has changed: {', '.join(changes)}", file=sys.stderr)
    tokenizer = RunFolder(folder).tokenizer()
    return _module("train").main(run, workdir=workdir, tokenizer=tokenizer, **flags)


def _local(workdir: str | Path) -> Path:
    if "://" in str(workdir):
        raise ConfigError("--workdir", f"{workdir} is a URL; mount it, and give the folder's path")
    return Path(workdir)


def _eval(args: list[str]) -> int | None:
    folder, rest = _operand(args, "eval", "DIR")
    fields = ("mesh", "evaluate", "loader", "data", "batch", "phases")
    run, flags = _saved(folder, rest, "eval", EvalFlags(), fields)
    return _module("evaluate").main(run, workdir=folder, **flags)


def _generate(args: list[str]) -> int | None:
    folder, rest = _operand(args, "generate", "DIR")
    run, flags = _saved(folder, rest, "generate", GenerateFlags(), ("mesh",))
    if not flags["prompt"]:
        raise ConfigError("--prompt", "missing; give a text to go on from")
    return _module("generate").main(run, workdir=folder, **flags)


def _bench(args: list[str]) -> int | None:
    path, rest = _operand(args, "bench", "CONFIG")
    run, flags = _configured(path, rest, "bench", BenchFlags())
    return _module("bench").main(run, name=path.stem, **flags)


def _plan(args: list[str]) -> int | None:
    path, rest = _operand(args, "plan", "CONFIG")
    run, flags = _configured(path, rest, "plan", PlanFlags())
    return _module("plan_command").main(run, name=path.stem, **flags)


def _data_show(args: list[str]) -> int | None:
    path, rest = _operand(args, "data show", "CONFIG")
    if not path.is_dir():
        run, flags = _configured(path, rest, "data show", ShowFlags())
        return _module("data.show").main(run, **flags)
    from jaxpt.folder import RunFolder

    run, flags = _saved(path, rest, "data show", ShowFlags(), ("loader", "data", "phases"))
    return _module("data.show").main(run, tokenizer=RunFolder(path).tokenizer(), **flags)


BUILD_HELP = (
    "Tokenises a source to ArrayRecord files with a manifest, to be read by Built.\n\n"
    "SOURCE is a path or glob of files of one kind (.txt, .md, .jsonl, .parquet, .arrayrecord; "
    ".gz and .zst of the first three), a CONFIG.py (its first phase's data and its tokenizer), "
    "corpus, tfds:NAME or hf:NAME.\n\n"
    "OUT is a new folder, or that of the same build, which goes on where it was interrupted. The "
    "result does not depend on --workers."
)


def _data_build(args: list[str]) -> int | None:
    from jaxpt.config import flags

    entries = flags.entries(BuildFlags())
    operands, rest = _operands(args, "data build", ("SOURCE", "OUT"), entries, BUILD_HELP)
    values = _values(entries, rest, "jaxpt data build SOURCE OUT")
    own = ("tokenizer", "shards", "workers", "deduplicate", "json")
    options = {name: value for name, value in values.items() if name not in own}
    word = values.pop("tokenizer")
    words = _module("data.build_source")
    if operands[0].endswith(".py"):
        from jaxpt import run as runs

        if flag := next((name for name, value in options.items() if value is not None), None):
            name = flag.replace("_", "-")
            raise ConfigError(f"--{name}", f"means nothing for {operands[0]}, which says it itself")
        run = runs.load(Path(operands[0]))
        source = run.phases[0].data
        tokenizer = run.tokenizer.build() if word is None else words.tokenizer_of(word)
    else:
        if word is None:
            raise ConfigError("--tokenizer", "missing; give bytes or a tokenizer's file")
        tokenizer = words.tokenizer_of(word)
        source = words.source_of(operands[0], options)
    settings = {name: values[name] for name in own[1:]}
    return _module("data.build").main(source, tokenizer, Path(operands[1]), **settings)


def _launch(kind: str, args: list[str]) -> int | None:
    from jaxpt import run as runs
    from jaxpt.config import flags

    launch, command = _module("launch"), f"launch {kind}"
    path, rest = _operand(args, command, "CONFIG")
    job = launch.KINDS[kind]()
    entries = flags.entries(job) + flags.entries(LaunchFlags())
    prog = f"jaxpt {command} {path}"
    _, values = runs.override(runs.load(path), rest, prog=prog, extra=entries)
    own = {field.name: values.pop(field.name) for field in dataclasses.fields(job)}
    if values["workdir"] is None:
        raise ConfigError("--workdir", "missing; give a folder that all machines share")
    _local(values["workdir"])
    return launch.main(
        dataclasses.replace(job, **own),
        path,
        _without(rest, {entry.name for entry in entries}),
        workdir=values["workdir"],
        name=values["job_name"] or path.stem.replace("_", "-"),
        out=Path(values["out"]),
        json=values["json"],
    )


def _without(args: list[str], names: set[str]) -> list[str]:
    """The command line without the flags of these names, and their values."""
    kept, own = [], False
    for arg in args:
        if arg.startswith("--"):
            name = arg[2:].partition("=")[0].replace("-", "_")
            own = name in names or name.removeprefix("no_") in names
        if not own:
            kept.append(arg)
    return kept


def _plain(
    command: str, names: tuple[str, ...], own: Any, call: tuple[str, ...], args: list[str]
) -> int | None:
    """A command of paths and flags. ``call``: module, function, and what it is given first."""
    from jaxpt.config import flags

    entries = flags.entries(own)
    operands, rest = _operands(args, command, names, entries)
    values = _values(entries, rest, f"jaxpt {command} {' '.join(names)}".rstrip())
    return getattr(_module(call[0]), call[1])(*call[2:], *map(Path, operands), **values)


def _checkpoint(action: str, own: Any) -> Callable[[list[str]], int | None]:
    call = "checkpoint_commands", "main", action
    return functools.partial(_plain, f"checkpoint {action}", ("DIR",), own, call)


def _export(args: list[str]) -> int | None:
    if "--to" in args[:2] and len(args) > 3:  # RUN --to hf OUT, as one says it
        args = [args[0], args[3], *args[1:3], *args[4:]]
    call = "interop_commands", "export_model"
    return _plain("export", ("RUN", "OUT"), ExportFlags(), call, args)


_IMPORT = "interop_commands", "import_model"
_MERGE = functools.partial(_plain, "merge", ("OUT",), MergeFlags(), ("merge", "main"))
_DOCTOR = functools.partial(_plain, "doctor", (), DoctorFlags(), ("doctor", "main"))
COMMANDS: dict[str, tuple[str, str, Callable[[list[str]], int | None]]] = {
    "train": (
        "CONFIG|--from-run DIR [--workdir DIR] [--dry-run]",
        "a new run, or go on with the one in DIR",
        _train,
    ),
    "eval": ("DIR [--split SPLIT] [--tasks A,B]", "losses of a run, or lm_eval's tasks", _eval),
    "generate": ("DIR --prompt TEXT [--mode R|S|X]", "text from a run's model", _generate),
    "bench": ("CONFIG [--input-only]", "speed and memory of a config on this machine", _bench),
    "plan": (
        "CONFIG --topology CHIP:NUMBER [--search]",
        "memory, exchanges and time on chips that are not here",
        _plan,
    ),
    "data show": (
        "CONFIG|DIR [--count N]",
        "examples as the model gets them, as text",
        _data_show,
    ),
    "data build": (
        "SOURCE OUT --tokenizer bytes|FILE",
        "token ids on disk; SOURCE is files, CONFIG, corpus, tfds:NAME or hf:NAME",
        _data_build,
    ),
    "data verify": (
        "OUT",
        "holds a build's files against their checksums",
        functools.partial(
            _plain, "data verify", ("OUT",), VerifyFlags(), ("data.build", "main_verify")
        ),
    ),
    **{
        f"launch {kind}": (
            "CONFIG --workdir DIR [--out DIR]",
            f"{meaning}; submits nothing",
            functools.partial(_launch, kind),
        )
        for kind, meaning in (
            ("slurm", "writes a batch script for SLURM"),
            ("gke", "writes a JobSet for Kubernetes on Google Cloud"),
            ("tpu-vm", "writes the gcloud commands for a TPU VM slice"),
        )
    },
    "checkpoint list": (
        "DIR",
        "what a run has saved",
        _checkpoint("list", ListCheckpointsFlags()),
    ),
    "checkpoint verify": (
        "DIR [--at-step N]",
        "holds all that was saved against its checksums",
        _checkpoint("verify", VerifyCheckpointsFlags()),
    ),
    "checkpoint clean": (
        "DIR [--keep N] [--dry-run]",
        "removes what was cut off or damaged, and old checkpoints where asked to",
        _checkpoint("clean", CleanCheckpointsFlags()),
    ),
    "import hf": (
        "DIR OUT",
        "a model of Hugging Face as a run's folder, to go on from",
        functools.partial(_plain, "import hf", ("DIR", "OUT"), ImportFlags(), _IMPORT),
    ),
    "export": ("RUN --to hf OUT", "a run's model as transformers loads it", _export),
    "merge": ("OUT --uniform RUN[@STEP] ...", "one model of several, as a run's folder", _MERGE),
    "doctor": ("", "versions, devices and what is wrong with them", _DOCTOR),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code (``jaxpt.errors.Exit``).

    What a person can put right is one line on stderr; other errors keep their traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args) or Exit.OK
    except SystemExit as stop:  # --help, from the library that prints it
        return stop.code if isinstance(stop.code, int) else Exit.OK
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); let nothing be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except BaseException as error:
        code = exit_code(error)
        if code == Exit.BUG and not _of_several():
            raise
        if code == Exit.BUG:
            traceback.print_exc()
        else:
            complain(error, code)
        if _of_several():  # at exit JAX would wait for the others
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code


def _of_several() -> bool:
    """Whether this process trains together with others."""
    distributed = sys.modules.get("jax.distributed")
    return distributed is not None and distributed.is_initialized()


def _dispatch(args: list[str]) -> int | None:
    if not args or args[0] in ("--help", "-h", "help"):
        print(_usage())
        return Exit.OK if args else Exit.CONFIG
    if args[0] == "--version":
        print(f"jaxpt {__version__}")
        return Exit.OK
    for words in (2, 1):
        name = " ".join(args[:words])
        if name in COMMANDS:
            return COMMANDS[name][2](args[words:])
    name = next((c for c in COMMANDS if c.startswith(f"{args[0]} ")), None)
    given = " ".join(args[:2]) if name and len(args) > 1 else args[0]
    near = [c for c in COMMANDS if c.startswith(given)]
    near += difflib.get_close_matches(given, list(COMMANDS), 2, 0.5)
    known = (
        f"nearest: {', '.join(dict.fromkeys(near))}" if near else f"commands: {', '.join(COMMANDS)}"
    )
    raise ConfigError(given, f"no such command; {known}")


def _usage() -> str:
    lines = ["usage: jaxpt COMMAND ...", "", "Pretrains language models in JAX.", ""]
    for name, (operands, meaning, _) in COMMANDS.items():
        lines += [f"  jaxpt {name} {operands}".rstrip(), f"      {meaning}"]
    lines += [
        "  jaxpt --version",
        "",
        "CONFIG is a Python file. Every field of it is a flag: jaxpt train CONFIG --help.",
    ]
    return "\n".join(lines)


def _operand(args: list[str], command: str, what: str) -> tuple[Path, list[str]]:
    """The path that a command starts with, and the rest."""
    operands, meaning, _ = COMMANDS[command]
    if args and args[0] in ("--help", "-h"):
        print(f"usage: jaxpt {command} {operands}\n\n{meaning}\n")
        print(f"jaxpt {command} {what} --help lists every flag.")
        raise SystemExit(Exit.OK)
    if not args or args[0].startswith("-"):
        raise ConfigError(what, f"missing; usage: jaxpt {command} {operands}")
    return Path(args[0]), args[1:]


def _operands(
    args: list[str], command: str, names: tuple[str, ...], entries: Sequence[Any], about: str = ""
) -> tuple[list[str], list[str]]:
    """The words that a command starts with, and the rest; prints the help where it is asked for."""
    from jaxpt.config import flags

    operands, meaning, _ = COMMANDS[command]
    if "--help" in args or "-h" in args:
        prog = f"jaxpt {command} {' '.join(names)}"
        flags.parse(entries, ["--help"], prog=prog, description=about or meaning)
    for i, name in enumerate(names):
        if len(args) <= i or args[i].startswith("-"):
            raise ConfigError(name, f"missing; usage: jaxpt {command} {operands}")
    return args[: len(names)], args[len(names) :]


def _values(entries: Sequence[Any], args: list[str], prog: str) -> dict[str, Any]:
    """Each flag's value, given or not."""
    from jaxpt.config import flags

    given = flags.parse(entries, args, prog=prog)
    return {entry.name: given.get(entry.name, entry.value) for entry in entries}


def _configured(path: Path, args: list[str], command: str, own: Any) -> tuple[Run, dict[str, Any]]:
    """The run of a config file with its overrides, and the command's own flags."""
    from jaxpt import run as runs
    from jaxpt.config import flags

    prog = f"jaxpt {command} {path}"
    return runs.override(runs.load(path), args, prog=prog, extra=flags.entries(own))


def _saved(
    folder: Path, args: list[str], command: str, own: Any, fields: tuple[str, ...]
) -> tuple[Run, dict[str, Any]]:
    """The run that a folder holds, with overrides of some fields, and the command's own flags."""
    from jaxpt import run as runs
    from jaxpt.config import flags
    from jaxpt.folder import RunFolder

    module = runs.load_with_module(config)[1] if (config := _value_of("--config", args)) else None
    run = RunFolder(folder).load(module)
    prog = f"jaxpt {command} {folder}"
    run, given = runs.override(run, args, prog=prog, extra=flags.entries(own), only=fields)
    given.pop("config", None)
    return run, given


def _value_of(flag: str, args: list[str]) -> str | None:
    """The value of a flag that is needed before the others can be understood."""
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == flag:
            return value if equals else args[i + 1] if i + 1 < len(args) else None
    return None


def _module(name: str) -> types.ModuleType:
    return importlib.import_module(f"jaxpt.{name}")


if __name__ == "__main__":
    sys.exit(main())
