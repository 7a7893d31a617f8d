"""Checkpoints: parameters, optimizer state, data position and progress, saved together by orbax.

What is stored is a nested dict of arrays with string keys (no class of ours, Flax's or optax's
is named in it) and two JSON objects: the progress, and a manifest that tells whether all is as it
was saved. A restore always says which shapes and shardings it wants, so a checkpoint can be read
on any mesh; and it is held against the manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from jaxpt import integrity, migrations
from jaxpt.duration import Duration
from jaxpt.errors import ConfigError, DataError, Exit, exit_code
from jaxpt.integrity import DamagedError
from jaxpt.signals import GRACE
from jaxpt.state import flatten, unflatten

Found = TypeVar("Found")
SET_ASIDE = "damaged-checkpoints"  # folder beside that of the checkpoints


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save, and what to keep."""

    every: int | float | Duration = dataclasses.field(
        default_factory=lambda: Duration(600, "seconds")
    )  # how often to save
    keep: int = 2  # how many of the latest to keep
    keep_every: int | None = None  # also keep those whose step is a multiple of this
    keep_best: int = 0  # also keep the so many with the lowest validation loss
    grace: float = GRACE  # seconds from a signal to the end: what is not saved by then is lost

    def __post_init__(self):
        if self.keep < 1:
            raise ConfigError("keep", f"{self.keep} is not valid; keep at least 1")
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError("keep_every", f"{self.keep_every} is not valid; give 1 or more steps")
        if self.keep_best < 0:
            raise ConfigError("keep_best", f"{self.keep_best} is not valid; give 0 or more")
        if not self.grace > 0:
            raise ConfigError("grace", f"{self.grace} is not valid; give seconds, above 0")

    def open(self, folder: pathlib.Path, run_config: str | None = None) -> Checkpoints:
        """The checkpoints in a folder, which is made if it is not there.

        Args:
          run_config: the run's config.json, whose hash each checkpoint notes.
        """
        return Checkpoints(folder, self, run_config=run_config)


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save."""

    def __init__(
        self,
        folder: pathlib.Path,
        config: Checkpoint | None = None,
        *,
        read_only: bool = False,
        run_config: str | None = None,
    ):
        config = config or Checkpoint()
        keep: list[policies.PreservationPolicy] = [policies.LatestN(config.keep)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        if config.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,  # the best is the lowest
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else policies.AnyPreservationPolicy(keep),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
        )
        self.folder, self.read_only = pathlib.Path(folder), read_only
        self._run_config = run_config
        self.held: set[int] = set()  # steps whose checkpoints are kept, too
        keep.append(_Held(self))
        self._manifests: dict[int, dict[str, Any]] = {}  # those that have been read
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc):
        self.close()

    def steps(self) -> list[int]:
        """The steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: Any, progress: dict[str, Any], loss: float | None = None
    ) -> bool:
        """Starts saving, in the background; the arrays may be donated as soon as this returns.

        Args:
          step: names the checkpoint; one that exists already is left as it is.
          state: a pytree of arrays.
          progress: a JSON object: phase, counters, data position.
          loss: validation loss, for ``keep_best``.

        Returns:
          Whether a checkpoint was begun.
        """
        if step in self._manager.all_steps():
            return False
        flat = flatten(state)
        manifest = integrity.manifest(step, flat, progress, self._run_config)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(unflatten(flat)),
            progress=ocp.args.JsonSave(progress),
            manifest=ocp.args.JsonSave(manifest),
        )
        metrics = None if loss is None else {"loss": loss}
        return self._manager.save(step, args=args, metrics=metrics, force=True)

    def manifest(self, step: int) -> dict[str, Any]:
        """What the checkpoint of a step should hold (``integrity.manifest``). Arrays are called as
        they are today; where they were saved under another name, that is "saved_as" of their row.

        Raises:
          DamagedError: it cannot be read.
          DataError: it was written by a later version.
        """
        if step in self._manifests:
            return self._manifests[step]
        with self._reading(step):
            args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
            found = self._manager.restore(step, args=args)["manifest"]
            if found["step"] != step or not integrity.is_whole(found):
                raise DamagedError(f"{self.folder / str(step)}: its manifest is not as saved")
            rows = found["arrays"]
            try:
                names = migrations.paths(rows, found["format"])
            except DataError as error:
                raise DataError(f"{self.folder / str(step)}: {error}") from None
            found["arrays"] = {
                path: rows[old] if path == old else rows[old] | {"saved_as": old}
                for path, old in names.items()
            }
            self._manifests[step] = found
            return found

    def progress(self, step: int) -> dict[str, Any]:
        """The JSON object saved at a step.

        Raises:
          DamagedError: it is not what was saved.
        """
        manifest = self.manifest(step)
        with self._reading(step):
            args = ocp.args.Composite(progress=ocp.args.JsonRestore())
            found = self._manager.restore(step, args=args)["progress"]
            if integrity.digest(found) != manifest["progress"]:
                raise DamagedError(f"{self.folder / str(step)}: its progress is not as saved")
            return found

    def restore(self, step: int, state: Any) -> Any:
        """The arrays saved at a step, in the structure, types and places of ``state``.

        Args:
          state: pytree of ShapeDtypeStructs with shardings.

        Raises:
          DataError: the checkpoint holds other arrays than those asked for.
          DamagedError: what it holds is not what was saved.
        """
        wanted = flatten(state)
        self._check(step, wanted, self.manifest(step)["arrays"], "this state")
        flat = self._read(step, wanted)
        return jax.tree_util.tree_structure(state).unflatten([flat[path] for path in wanted])

    def restore_params(self, step: int, params: Any) -> Any:
        """The parameters of the state saved at a step, without reading the rest of it.

        Args:
          params: nested dict of ShapeDtypeStructs with shardings.

        Raises:
          DataError: the checkpoint holds other parameters than those asked for.
          DamagedError: what it holds is not what was saved.
        """
        wanted = flatten({"params": params})
        stored = self.manifest(step)["arrays"]
        stored = {path: row for path, row in stored.items() if path.startswith("params/")}
        self._check(step, wanted, stored, "these parameters")
        return unflatten(self._read(step, wanted, partial=True))["params"]

    def verify(self, step: int) -> None:
        """Reads all that was saved at a step, array by array, on the host.

        Raises:
          DamagedError: something is not as it was saved.
        """
        self.progress(step)
        for path in self.manifest(step)["arrays"]:
            self.array(step, path)

    def array(self, step: int, path: str) -> np.ndarray:
        """One of the arrays saved at a step, on the host. Raises DamagedError."""
        row = self.manifest(step)["arrays"][path]
        wanted = {path: np.empty(row["shape"], row["dtype"])}
        return self._read(step, wanted, partial=True)[path]

    def newest(self, read: Callable[[int], Found]) -> tuple[Found | None, dict[int, str]]:
        """What ``read`` makes of the newest checkpoint that is not damaged, on every process.

        Damaged ones that are newer are moved out of the way, unless this is read-only: into
        ``damaged-checkpoints`` beside this folder.

        Args:
          read: step -> anything; raises DamagedError.

        Returns:
          (that, or None where there is no checkpoint; step -> what is wrong with it).

        Raises:
          DataError: there are checkpoints, and all are damaged. Nothing has been moved.
        """
        bad: dict[int, str] = {}
        for step in reversed(self.steps()):
            found, error = None, None
            try:
                found = read(step)
            except DamagedError as damage:
                error = str(damage)
            if _everywhere(error is None):
                self._set_aside(bad)
                return found, bad
            bad[step] = error or "another process cannot read it"
        if bad:
            causes = "; ".join(f"{step}: {error}" for step, error in bad.items())
            raise DataError(f"no checkpoint in {self.folder} is whole: {causes}")
        return None, bad

    def _set_aside(self, bad: dict[int, str]) -> None:
        if not bad or self.read_only:
            return
        if jax.process_index() == 0:
            home = self.folder.parent / SET_ASIDE
            home.mkdir(exist_ok=True)
            for step in bad:
                taken = sum(path.stem == str(step) for path in home.iterdir())
                place = home / (f"{step}.{taken}" if taken else str(step))
                shutil.move(self.folder / str(step), place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manifests.clear()  # a step may be saved anew
        self._manager.reload()

    def _check(self, step: int, wanted: dict, stored: dict[str, Any], what: str) -> None:
        """Raises DataError where paths or shapes differ."""
        for path in [*wanted, *stored]:
            has = tuple(stored[path]["shape"]) if path in stored else None
            asked = tuple(wanted[path].shape) if path in wanted else None
            if has != asked:
                names = ["nothing" if s is None else f"shape {s}" for s in (has, asked)]
                raise DataError(
                    f"{self.folder / str(step)} does not hold {what}: "
                    f"at {path} it has {names[0]}, the run {names[1]}"
                )

    def _read(self, step: int, wanted: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
        """Arrays by path as they were saved, held against the manifest, then in the types of
        ``wanted``."""
        manifest = self.manifest(step)
        rows = manifest["arrays"]
        names = {path: rows[path].get("saved_as", path) for path in wanted}
        target = unflatten({names[path]: _as_saved(x, rows[path]) for path, x in wanted.items()})
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=partial)
        with self._reading(step):
            found = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
            saved = flatten(found)
            flat = {path: saved[names[path]] for path in wanted}
            try:
                integrity.check_arrays(manifest, flat)
            except DamagedError as error:
                raise DamagedError(f"{self.folder / str(step)}: {error}") from None
        return {path: flat[path].astype(x.dtype) for path, x in wanted.items()}

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Errors of orbax and below as DamagedError, apart from those that are not the files'."""
        try:
            yield
        except (DataError, PermissionError):
            raise
        except Exception as error:
            if exit_code(error) != Exit.BUG:
                raise
            text = (str(error).splitlines() or [""])[0][:200]
            where = self.folder / str(step)
            raise DamagedError(
                f"{where}: cannot be read ({type(error).__name__}: {text})"
            ) from error

    def wait(self):
        """Returns when all that was begun is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self):
        self._manager.wait_until_finished()
        self._manager.close()


@dataclasses.dataclass
class _Held(policies.PreservationPolicy):
    """Keeps the checkpoints that ``held`` names at the time."""

    checkpoints: Checkpoints

    def should_preserve(self, checkpoints, *, context):
        return [each.step in self.checkpoints.held for each in checkpoints]


def _as_saved(x: Any, row: dict[str, Any]) -> Any:
    """The shape and place of ``x`` with the type that was saved."""
    if isinstance(x, np.ndarray):
        return x
    return jax.ShapeDtypeStruct(x.shape, row["dtype"], sharding=x.sharding)


def _everywhere(good: bool) -> bool:
    """Whether it is so on every process."""
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.asarray(good))))
