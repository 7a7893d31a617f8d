"""Processes that make batches, where one of them is killed, and where the run is."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import multiprocessing, os, signal, sys, time
from jaxpt.data.loader import Loading, build_loader
from jaxpt.data.text import Text
from jaxpt.data.tokenizers import Bytes
from jaxpt.errors import LostProcessError
from jaxpt.objectives.causal import CausalLM

def build(path):
    tokenizer = Bytes().build()
    features = CausalLM().build(tokenizer.vocabulary, length=32, target_length=None)
    text = Text(path, path, document="line")
    return build_loader(text, features, tokenizer, batch=8, length=32, loading=Loading(workers=1))

if __name__ == "__main__":
    with build(sys.argv[1]) as loader:
        next(loader)
        (worker,) = multiprocessing.active_children()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)  # as a terminal or a scheduler does, with the run itself
        for _ in range(20):
            next(loader)
        os.kill(worker.pid, signal.SIGKILL)
        try:
            while True:
                next(loader)
        except LostProcessError as error:
            print(error, flush=True)
    loader = build(sys.argv[1])
    next(loader)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_they_outlive_signals_but_not_their_run(tmp_path):
    script, text = tmp_path / "script.py", tmp_path / "text"
    script.write_text(SCRIPT)
    text.write_text("\n".join("".join(f"{i:03d}" for i in range(n)) for n in (200, 300, 250)))
    command = [sys.executable, str(script), str(text)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        lost, pids = run.stdout.readline(), run.stdout.readline()
        run.send_signal(signal.SIGKILL)
    assert lost == "a process that makes batches is gone without a word: killed, or out of memory\n"
    left = [int(pid) for pid in pids.split()]
    assert left
    until = time.monotonic() + 60
    while any(map(alive, left)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, left))
