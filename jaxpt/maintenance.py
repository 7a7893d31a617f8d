"""Google Cloud's notice that a machine will be taken away or repaired.

Its metadata server says so about a minute before, and answers a request that waits until something
changes (https://cloud.google.com/compute/docs/metadata/querying-metadata). JAX's own
preemption service listens to SIGTERM alone, which a run takes itself. No other address is ever
asked, and this one only on a TPU VM.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from jaxpt.distributed import METADATA, on_tpu_vm

AGAIN = 30.0  # seconds to the next question where the server does not answer
QUIET = ("NONE", "FALSE", "")  # what it says while all is well


@contextlib.contextmanager
def notices(tell: Callable[[str], None], server: str | None = None) -> Iterator[None]:
    """While entered, calls ``tell`` once, in a thread, with the notice if one comes.

    Args:
      tell: is given "maintenance: TERMINATE_ON_HOST_MAINTENANCE", say.
      server: URL of the metadata; None: Google Cloud's, on a TPU VM, and else nothing is asked.
    """
    server = METADATA if server is None and on_tpu_vm() else server
    over = threading.Event()
    if server is not None:
        args = (server, tell, over)
        threading.Thread(target=_listen, args=args, name="maintenance", daemon=True).start()
    try:
        yield
    finally:
        over.set()  # the thread waits for an answer, and ends with the process if none comes


def _listen(server: str, tell: Callable[[str], None], over: threading.Event) -> None:
    seen = "0"  # the state of what has been told last, as the server calls it
    while not over.is_set():
        url = f"{server}?recursive=true&wait_for_change=true&timeout_sec=300&last_etag={seen}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=330) as answer:
                found, seen = json.loads(answer.read()), answer.headers.get("ETag", "0")
        except (urllib.error.URLError, OSError, ValueError):
            over.wait(AGAIN)
            continue
        if (notice := _notice(found)) and not over.is_set():
            tell(notice)
            return
        time.sleep(0.1)


def _notice(found: Any) -> str | None:
    """Of the metadata of this machine."""
    event, preempted = str(found.get("maintenanceEvent", "")), str(found.get("preempted", ""))
    if event not in QUIET:
        return f"maintenance: {event}"
    return "preemption" if preempted not in QUIET else None
