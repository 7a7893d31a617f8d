"""A run's folder: who may write to it, and whether it holds this run.

config.json  tokenizer/  checkpoints/STEP/  metrics.jsonl  status.json
results.json  samples.json  report.html  tensorboard/  environment.json  guard.jsonl
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxpt.data.tokenizers import Tokenizer, load_tokenizer
from jaxpt.errors import ConfigError
from jaxpt.files import read_json, write_atomic
from jaxpt.run import Run, from_json, to_json

# What may change when a run goes on: its length, how it is watched, guarded and laid out.
MAY_CHANGE = (
    "monitor",
    "checkpoint",
    "evaluate",
    "guard",
    "mesh",
    "deterministic",
    "loader.workers",
    "loader.prefetch",
)
LENGTHS = ("steps", "tokens", "examples", "epochs", "seconds")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is read or written by making one."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def saved_tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def guard(self) -> Path:
        return self.path / "guard.jsonl"

    def load(self, config_module: Any = None) -> Run:
        """The run that the folder holds.

        Args:
          config_module: the user's config file as a module, where it defines classes of its own.

        Raises:
          ConfigError: the folder holds no run.
        """
        if not self.config.is_file():
            raise ConfigError("workdir", f"{self.path} holds no run (it has no config.json)")
        try:
            text = self.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("workdir", f"{self.config} cannot be read: {error}") from None
        return from_json(text, config_module)

    def last_step(self) -> int | None:
        """The step of the last checkpoint that is there, whole or damaged; None: there is none."""
        paths = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return max((int(p.name) for p in paths if p.name.isdecimal()), default=None)

    def has_checkpoint(self) -> bool:
        """Whether a checkpoint is there, whole or damaged."""
        return self.last_step() is not None

    def claim(self, run: Run, *, restart: bool = False) -> None:
        """Makes the folder this run's, or makes sure that it already is.

        Raises:
          ConfigError: the folder holds something else, or another run; the message names what
            differs. Or it holds metrics without a checkpoint, and ``restart`` is not set.
        """
        if self.config.is_file():
            different = differences(self._saved(), _plain(run))
            if different:
                raise ConfigError(
                    "workdir",
                    f"{self.path} holds a run with other choices ({', '.join(different[:4])}"
                    f"{', ...' if len(different) > 4 else ''}); "
                    "give another --workdir, or the same choices to go on",
                )
        elif self.path.exists() and any(p for p in self.path.iterdir() if p.name != ".lock"):
            raise ConfigError(
                "workdir", f"{self.path} is not empty and holds no run; give another --workdir"
            )
        written = self.metrics.is_file() and self.metrics.stat().st_size
        if written and not self.has_checkpoint():
            if not restart:
                raise ConfigError(
                    "workdir",
                    f"{self.path} holds a run without a checkpoint; "
                    "add --restart to begin it again from step 0",
                )
            self.metrics.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.config, to_json(run))

    def _saved(self) -> Any:
        """config.json as today's code writes it, with defaults for fields that have come since."""
        try:
            return _plain(self.load())
        except ConfigError:  # it has classes of the user's own file: compare it as it stands
            return read_json(self.config)

    def tokenizer(self, run: Run | None = None, given: Tokenizer | None = None) -> Tokenizer:
        """The tokenizer that the folder holds; else the one that is given; else that of ``run``.
        It is not saved by this.

        Raises:
          ConfigError: there is neither.
        """
        if self.saved_tokenizer.is_dir():
            return load_tokenizer(self.saved_tokenizer)
        if given is not None:
            return given
        if run is None:
            raise ConfigError("workdir", f"{self.path} holds no tokenizer")
        return run.tokenizer.build()

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Saves the run's tokenizer in the folder, unless it is there."""
        if not self.saved_tokenizer.is_dir():
            # A half-written folder must not look complete: write beside it, then rename.
            partial = self.path / f".tokenizer.{os.getpid()}"
            tokenizer.save(partial)
            partial.rename(self.saved_tokenizer)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a process writes to the folder; the system lets go of it if that process dies.

        Raises:
          ConfigError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise ConfigError(
                    "workdir", f"another process (pid {holder}) is writing to {self.path}"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths at which two JSON values differ, apart from what may change in a resumed run."""
    if path in MAY_CHANGE or (path.startswith("phases.") and path.rsplit(".", 1)[-1] in LENGTHS):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(old) + [k for k in new if k not in old]
        return [
            p
            for k in keys
            for p in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            p
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for p in differences(a, b, f"{path}.{i}")
        ]
    return [] if old == new else [path or "config"]


def _plain(run: Run) -> Any:
    return json.loads(to_json(run))
