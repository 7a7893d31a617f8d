"""status.json: whether a run is running, finished, stopped or failed, and why."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxpt import environment
from jaxpt.errors import Exit, exit_code
from jaxpt.files import read_json, write_json
from jaxpt.meter import Clock

State = Literal["running", "finished", "stopped", "failed"]
SECONDS = 5.0  # while all is well, the file is written no more often than this


class Status:
    """Writes status.json of one session of a run; every write is atomic.

    The file holds: state, cause (None unless stopped, failed, or finished before its time; a
    failure begins with its kind, which is the name of an exit code, or of an error that is none of
    ours), then what ``write`` is given
    (step, steps, phase, loss, tokens, seconds), updated and started (UTC, ISO 8601),
    resumed_from, pid, host, command, devices, versions, commit.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        devices: str,
        resumed_from: int,
        clock: Clock = time.monotonic,
    ):
        self.path = Path(workdir) / "status.json"
        self._clock, self._written = clock, -float("inf")
        self._session = {
            "started": _now(),
            "resumed_from": resumed_from or None,
            "pid": os.getpid(),
            "host": platform.node(),
            "command": sys.argv,
            "devices": devices,
            "versions": environment.versions(),
            "commit": environment.commit(),
        }

    def due(self) -> bool:
        return self._clock() - self._written >= SECONDS

    def write(self, state: State, cause: str | None, progress: Mapping[str, Any]) -> None:
        self._written = self._clock()
        status = {"state": state, "cause": cause, **progress, "updated": _now(), **self._session}
        write_json(self.path, status, durable=state != "running")


def outcome(
    error: BaseException | None, stopped: str | None, at_end: str | None = None
) -> tuple[State, str | None]:
    """How a run is to be called that ends with an exception, or with a stop on request, or else is
    finished, and what is to be said of it."""
    if stopped is not None:
        return "stopped", stopped
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "interrupted (Ctrl-C)"
    if error is not None:
        code = exit_code(error)
        kind = type(error).__name__ if code == Exit.BUG else code.name.lower().replace("_", " ")
        return "failed", f"{kind}: {error}".strip(": ")
    return "finished", at_end


def read_status(workdir: str | os.PathLike) -> dict[str, Any]:
    """status.json, or {} where there is none. A run that says "running" and whose process on this
    machine is gone has "failed": it was killed, or the machine ran out of memory.

    Raises ValueError where the file is no JSON object.
    """
    path = Path(workdir) / "status.json"
    status = read_json(path, {})
    if not isinstance(status, dict):
        raise ValueError(f"{path}: not a JSON object")
    running = status.get("state") == "running" and status.get("host") == platform.node()
    if running and not _alive(int(status["pid"])):
        cause = f"process {status['pid']} is gone without a word: killed, or out of memory"
        return status | {"state": "failed", "cause": cause}
    return status


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
