"""The errors that a person is meant to read, and the exit codes that a program is."""

from __future__ import annotations

import enum
import errno
import os
import re
import signal
import sys


def printable(text: str) -> str:
    """``text`` as any terminal and any file can have it: what comes from a file may be half of a
    surrogate pair, or a command to the terminal."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class ConfigError(ValueError):
    """A choice in the configuration that cannot work.

    ``field`` is the dotted path of the choice (``model.width``); the message says what is
    wrong and what would be valid, in one line. Raised before any device work.
    """

    def __init__(self, field: str, message: str):
        self.field = field = printable(field)
        self.message = message = printable(message)
        super().__init__(f"{field}: {message}" if field else message)

    def __reduce__(self):
        return type(self), (self.field, self.message)  # it crosses process borders whole

    def within(self, parent: str) -> ConfigError:
        """The same error, seen from the dataclass that holds the one that raised it."""
        return ConfigError(".".join(filter(None, (parent, self.field))), self.message)


class DataError(ValueError):
    """Input data that cannot be read; the message names the file and, if there is one, the line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class NonFiniteError(FloatingPointError):
    """Losses or gradients are no longer numbers; the message says since when, and what is left."""


class OutOfMemoryError(MemoryError):
    """A device has too little memory for a step; the message says what the step needs."""


class LostProcessError(RuntimeError):
    """Another process of the run is missing or has ended; the message says which."""


class Exit(enum.IntEnum):
    """Exit codes of the ``jaxpt`` command. A signal's is 128 + its number, as in a shell."""

    OK = 0
    BUG = 1  # an error that is not ours; Python prints its traceback
    CONFIG = 2  # a choice that cannot work, or an unknown command or flag
    DATA = 3  # input data that cannot be read
    NON_FINITE = 4  # loss or gradient is no longer a number
    OUT_OF_MEMORY = 5  # on the device or the host
    DISK = 6  # full, or not writable
    LOST_PROCESS = 7  # another process of the run is missing or has ended
    DATA_ENDED = 8  # the run is finished, but a phase ended before its steps for want of data
    INTERRUPTED = 128 + signal.SIGINT  # Ctrl-C; a run under way has been saved
    TERMINATED = 128 + signal.SIGTERM  # preempted; a run under way has been saved


def exit_code(error: BaseException) -> Exit:
    """The exit code for an error that ends the program."""
    if isinstance(error, ConfigError):
        return Exit.CONFIG
    if isinstance(error, DataError):
        return Exit.DATA
    if isinstance(error, LostProcessError):
        return Exit.LOST_PROCESS
    if isinstance(error, FloatingPointError):
        return Exit.NON_FINITE
    # JAX's and tensorstore's errors are told by their texts: importing JAX to ask for its class
    # would start it, and tensorstore's have none of their own.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
        return Exit.DISK
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:200]:
        return Exit.OUT_OF_MEMORY
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    return Exit.BUG


HINTS = {
    Exit.OUT_OF_MEMORY: "; lower --batch or --length, or raise --step.accumulate; what fits says: "
    "jaxpt plan CONFIG --topology CHIP:NUMBER --search",
    Exit.LOST_PROCESS: "; start all processes again to go on from the last checkpoint",
    Exit.DISK: "; make room there, see that it may be written to, or give another --workdir",
}


def complain(error: BaseException, code: Exit) -> None:
    """One line on stderr, red where that is a terminal."""
    text = str(error) if isinstance(error, ConfigError | DataError) else str(error).split("\n")[0]
    name = "interrupted" if code == Exit.INTERRUPTED else "error"
    text = text or ("" if code == Exit.INTERRUPTED else type(error).__name__)
    line = f"{name}: {' '.join(text.split())}{HINTS.get(code, '')}".removesuffix(": ")
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\x1b[31m{line}\x1b[0m" if red else line, file=sys.stderr)
