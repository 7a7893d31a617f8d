"""Processes that make batches: they end with the one that started them, and their loss is said."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection
from types import FrameType

import grain

from jaxpt.errors import LostProcessError

LINGER = 150.0  # seconds between SIGTERM and the end: more than a run takes to stop


def by_process(dataset: grain.IterDataset, workers: int, ahead: int) -> grain.IterDataset:
    """The dataset's elements, made by so many processes in turn, ``ahead`` of them by each."""
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
    return dataset.mp_prefetch(options, worker_init_fn=_begin)


def _begin(index: int, workers: int) -> None:
    """What a worker does first.

    Ends this process when the one that started it has, killed and so without a word: grain's
    worker would wait for ever for somebody to take its batches. Ctrl-C and schedulers signal all
    processes of a run: the one that started this one then ends it in order.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _later)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def _later(number: int, frame: FrameType | None) -> None:
    """Ends this process if nobody else does: not at once, as batches may be needed to stop."""
    timer = threading.Timer(LINGER, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def losses_said() -> Iterator[None]:
    """A worker's sudden end as LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):  # as grain says it
            raise
        raise LostProcessError(
            "a process that makes batches is gone without a word: killed, or out of memory"
        ) from error
