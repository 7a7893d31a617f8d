"""A stop that can be asked for: what SIGINT, SIGTERM and SIGUSR1 do to a run.

The first one asks for a stop, and from then on there is a time of grace. The loop looks here after
every step, and is interrupted where it waits or evaluates; it saves and ends. A thread watches the
time, since the main thread may be in a compiler or a collective operation, where it hears of no
signal: when the time is over, or at a second signal, it ends the process. That loses the steps
since the last checkpoint and harms nothing, as a kill does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

GRACE = 30.0  # seconds
PROMPT = 2.0  # seconds that the loop has to end in order where there is nothing to save
LOOK = 0.25  # seconds between two looks at the time
ONE = 0.5  # seconds in which several signals are one: a scheduler's, to a process and its group


class Interrupted(BaseException):
    """Raised where the loop may be interrupted and a stop is asked for; the loop catches it."""


class StopRequest:
    """While entered, the first of ``SIGNALS`` sets ``signal``; a second one ends the process.

    Only the main thread can take signals: elsewhere (a notebook's worker, a test) they are left
    as they are. ``request`` may be called by any thread.

    Args:
      grace: seconds from the request to the end.
      leaves: whether the process is ours to end, by ``os._exit``: the command's is, a notebook's
        is not. Else a second signal raises KeyboardInterrupt, and the grace does not end.

    Attributes:
      signal: the first that came, or None.
      cause: what asked for the stop, in words.
      idle: says whether nothing would be lost if the process ended now.
      leaving: called before the process is ended, with why; returns what to tell the user.
      told: called once with the signal, so that others can be told.
    All three are called by the watching thread.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, grace: float = GRACE, *, leaves: bool = False):
        self.grace, self.leaves = grace, leaves
        self.signal: signal.Signals | None = None
        self.cause = ""
        self.idle: Callable[[], bool] = lambda: False
        self.leaving: Callable[[str], str] = lambda why: why
        self.told: Callable[[int], None] = lambda number: None
        self._asked = 0.0  # when
        self._interruptible = False
        self._before: dict[signal.Signals, object] = {}
        self._fd_before = -1
        self._here: socket.socket | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def request(self, number: int = signal.SIGTERM, cause: str = "") -> None:
        """Asks for a stop, as a first signal does; nothing more where one has been asked for."""
        if self.signal is None:
            self._asked = time.monotonic()
            self.cause = cause or signal.Signals(number).name
            self.signal = signal.Signals(number)
            here = self._here
            if here is not None:
                with contextlib.suppress(OSError):  # closed just now: there is nothing to watch
                    here.send(b"\0")  # wakes the watch

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Around what may be left at any point: there, in the main thread, a signal raises
        Interrupted; and so does a stop that has been asked for before."""
        try:
            self._interruptible = True
            if self:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def __enter__(self) -> StopRequest:
        here, there = socket.socketpair()
        here.setblocking(False)
        self._here = here
        threading.Thread(target=self._watch, args=(there,), name="stop-watch", daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            # Python's own handler, which is called between lines of Python, comes too late for
            # the watch: what C writes here does not.
            self._fd_before = signal.set_wakeup_fd(here.fileno(), warn_on_full_buffer=False)
            self._before = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
            signal.set_wakeup_fd(self._fd_before)
            self._before = {}
        if self._here is not None:
            self._here.close()
            self._here = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self._is_second()
        self.request(number)
        if again and not self.leaves:
            raise KeyboardInterrupt
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def _is_second(self) -> bool:
        return self.signal is not None and time.monotonic() - self._asked > ONE

    def _watch(self, there: socket.socket) -> None:
        """In a thread of its own, until the other end is closed."""
        told = False
        while True:
            heard = b""
            if select.select([there], [], [], LOOK if told else None)[0]:
                heard = there.recv(64)
                if not heard:
                    there.close()
                    return
            for number in heard:
                if number in self.SIGNALS:
                    if self._is_second() and self.leaves:
                        self._leave("a second signal came")
                    self.request(number)
            if self.signal is not None and not told:
                told = True
                self.told(self.signal)
            since = time.monotonic() - self._asked
            if told and self.leaves and since > min(self.grace, PROMPT):
                if since > self.grace:
                    self._leave(f"not all was saved within {self.grace:g} s")
                if self._has_nothing_to_lose():
                    self._leave("there was nothing to save")

    def _has_nothing_to_lose(self) -> bool:
        try:
            return self.idle()
        except OSError:  # a folder that cannot be looked at tells nothing
            return False

    def _leave(self, why: str) -> None:
        assert self.signal is not None
        line = why
        try:
            line = self.leaving(why)
        finally:
            try:
                print(f"stopped by {self.cause}: {line}", file=sys.stderr, flush=True)
            finally:
                os._exit(128 + self.signal)
