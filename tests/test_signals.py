"""A stop by signals: real processes, which know nothing of JAX and start at once."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from jaxpt.maintenance import notices
from jaxpt.rollcall import RollCall
from jaxpt.signals import Interrupted, StopRequest

BEGIN = """
    import hashlib, queue, sys, time
    from jaxpt import signals
    from jaxpt.signals import Interrupted, StopRequest
    def compile():  # a long call into C, in which Python hears of no signal
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)
"""


@contextlib.contextmanager
def process(body: str):
    """A Python process that has got to where it says that it is ready."""
    code = textwrap.dedent(BEGIN) + textwrap.dedent(body)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as found:
        try:
            assert found.stdout is not None
            assert found.stdout.readline() == "ready\n", found.communicate()
            yield found
        finally:
            found.kill()


def end(found, within: float):
    """(exit code, stdout, stderr) of a process that has to end by itself."""
    out, err = found.communicate(timeout=within)
    return found.returncode, out, err


def test_where_python_hears_nothing_the_grace_ends_it():
    with process("""
        with StopRequest(0.5, leaves=True) as stop:
            stop.leaving = lambda why: f"{why}; checkpoint 7 is there"
            compile()
    """) as found:
        began = time.monotonic()
        found.send_signal(signal.SIGTERM)
        code, _, err = end(found, 30)
        assert code == 128 + signal.SIGTERM
        assert err == "stopped by SIGTERM: not all was saved within 0.5 s; checkpoint 7 is there\n"
        assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize("idle", [True, False])
def test_where_there_is_nothing_to_save_it_does_not_wait(idle):
    with process(f"""
        signals.PROMPT = 0.3
        with StopRequest(1.5, leaves=True) as stop:
            stop.idle = lambda: {idle}
            compile()
    """) as found:
        found.send_signal(signal.SIGUSR1)
        code, _, err = end(found, 30)
        assert code == 128 + signal.SIGUSR1
        assert ("there was nothing to save" in err) == idle


def test_a_second_signal_ends_it_at_once():
    with process("""
        signals.ONE = 0.2
        with StopRequest(600, leaves=True):
            compile()
    """) as found:
        found.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert found.poll() is None
        found.send_signal(signal.SIGINT)
        code, _, err = end(found, 30)
        assert code == 128 + signal.SIGTERM  # what it was asked first
        assert "stopped by SIGTERM: a second signal came" in err


def test_several_signals_at_once_are_one_and_the_loop_ends_in_order():
    """And where the loop waits it is interrupted."""
    with process("""
        with StopRequest(60, leaves=True) as stop:
            try:
                with stop.interrupting():
                    print("ready", flush=True)
                    queue.Queue().get()
            except Interrupted:
                time.sleep(0.2)
                print("saved", stop.signal.name, flush=True)
    """) as found:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            found.send_signal(number)
        code, out, err = end(found, 30)
        assert (code, err) == (0, "")
        assert out in ("saved SIGINT\n", "saved SIGTERM\n")  # the system does not say which


def test_here_a_second_signal_is_as_python_has_it(monkeypatch):
    """A notebook's process is not ours to end."""
    monkeypatch.setattr("jaxpt.signals.ONE", 0.0)
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    threads = threading.active_count()
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        assert stop.signal == signal.SIGINT
        with pytest.raises(Interrupted), stop.interrupting():
            pass
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    until = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_all_processes_hear_of_a_stop():
    """The one that is asked tells process 0, and that all others; who joins late hears of it."""
    with (
        RollCall.host(3, ("127.0.0.1", 0)) as zero,
        RollCall.join(("127.0.0.1", zero.port), 3, 1, 10) as one,
        RollCall.join(("127.0.0.1", zero.port), 3, 2, 10) as two,
    ):
        with StopRequest() as first, StopRequest() as asked:
            zero.on_stop(first.request)
            asked.told = one.ask_to_stop
            asked.request(signal.SIGUSR1)
            until = time.monotonic() + 10
            while not (first and two._stop) and time.monotonic() < until:
                time.sleep(0.01)
            late = StopRequest()
            two.on_stop(late.request)
        assert first.signal == late.signal == signal.SIGUSR1


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers as Google Cloud's metadata server: at once, then when something changes."""

    answers = ({"maintenanceEvent": "NONE", "preempted": "FALSE"},)
    asked: tuple[str, ...] = ()

    def do_GET(self):  # (the name is http.server's)
        type(self).asked += (self.path,)
        found = self.answers[min(len(self.asked), len(self.answers)) - 1]
        body = json.dumps(found).encode()
        assert self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200)
        self.send_header("ETag", f"e{len(self.asked)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"maintenanceEvent": "TERMINATE_ON_HOST_MAINTENANCE"}, "TERMINATE_ON_HOST_MAINTENANCE"),
        ({"preempted": "TRUE"}, "preemption"),
    ],
)
def test_a_notice_of_the_cloud_asks_for_a_stop(change, told):
    quiet = Metadata.answers[0]
    handler = type("Handler", (Metadata,), {"answers": (quiet, quiet, quiet | change), "asked": ()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        heard = threading.Event()
        notes: list[str] = []

        def tell(notice: str) -> None:
            notes.append(notice)
            heard.set()

        with notices(tell, f"http://127.0.0.1:{server.server_port}/"):
            assert heard.wait(20)
        server.shutdown()
    assert len(notes) == 1
    assert told in notes[0]
    assert len(handler.asked) == 3
    assert "last_etag=e2" in handler.asked[2]  # waits for what comes after that


def test_elsewhere_no_server_is_asked(monkeypatch):
    monkeypatch.setattr("jaxpt.maintenance.on_tpu_vm", lambda: False)
    threads = threading.active_count()
    with notices(lambda notice: None):
        assert threading.active_count() == threads
