"""What a step needed where a device ran out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from jaxpt.console import short
from jaxpt.errors import Exit, OutOfMemoryError, exit_code
from jaxpt.program import Program


@contextlib.contextmanager
def explained(program: Program) -> Iterator[None]:
    """An error for want of memory as OutOfMemoryError, with what the program's train step needs."""
    try:
        yield
    except Exception as error:
        if exit_code(error) != Exit.OUT_OF_MEMORY or isinstance(error, OutOfMemoryError):
            raise
        cause = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(". ")
        raise OutOfMemoryError(f"{cause}; {needs(program)}") from error


def needs(program: Program) -> str:
    """The memory of the compiled train step, for people."""
    compiled = vars(program).get("train_step")  # it may not have come so far
    if compiled is None:
        return "the train step could not be compiled"
    found = compiled.program.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    parts = f"{short(kept)}B of state and batch, {short(found.temp_size_in_bytes)}B on the way"
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    of = f", of {short(limit)}B" if limit else ""
    return f"the train step needs {short(kept + found.temp_size_in_bytes)}B a device{of} ({parts})"
