"""Who of several processes is there: a roll call at the start, and word of those that are lost.

JAX's own runtime ends a process whose peer is missing or gone by aborting it, without a name.
Here every process keeps a connection to process 0. A process that dies closes its connection, so
that the others know at once who it was, and can end in order.
"""

from __future__ import annotations

import json
import platform
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxpt.errors import LostProcessError

RETRY = 0.1  # seconds between attempts to reach process 0
KEEPALIVE = 20  # seconds after which a host that has vanished (no power, no network) is noticed
LONGEST = 1 << 16  # bytes of a message

Address = tuple[str, int]


def meet(address: Address, processes: int, index: int, timeout: float) -> None:
    """Returns when all processes have come; every one calls this.

    Args:
      address: where process 0 listens, known to all; free again afterwards.
      processes: how many there are.
      index: which one this is.
      timeout: seconds.

    Raises:
      LostProcessError: some have not come; the message names them.
    """
    if index == 0:
        with RollCall.host(processes, address) as here:
            here.barrier("meet", timeout)
    else:
        with RollCall.join(address, processes, index, timeout) as here:
            here.barrier("meet", timeout)


class RollCall:
    """A process's place among several; a context manager.

    Leaving it with an exception tells the others what it was.

    Attributes:
      lost: what is known of a process that has ended too early, or None.
    """

    def __init__(self, processes: int, index: int, on_loss: Callable[[str], None] | None = None):
        self.processes, self.index, self.lost = processes, index, None
        self._on_loss = on_loss
        self._changed = threading.Condition()
        self._arrived: dict[str, set[int]] = {}
        self._open: set[str] = set()  # barriers that all have reached
        self._names: dict[int, str] = {index: platform.node()}
        self._peers: dict[int, socket.socket] = {}
        self._left: set[int] = set()
        self._stop: int | None = None  # the signal that some process was asked to stop by
        self._told_to_stop: Callable[[int], None] | None = None
        self._selector = selectors.DefaultSelector()
        self._closing = False
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="roll-call", daemon=True)

    @classmethod
    def host(
        cls, processes: int, address: Address, on_loss: Callable[[str], None] | None = None
    ) -> RollCall:
        """Process 0's. ``on_loss`` is called in another thread, with what is known."""
        here = cls(processes, 0, on_loss)
        # All interfaces: by which the others come is not known.
        here._listener = socket.create_server(("", address[1]))
        here._selector.register(here._listener, selectors.EVENT_READ)
        here._thread.start()
        return here

    @classmethod
    def join(
        cls,
        address: Address,
        processes: int,
        index: int,
        timeout: float,
        on_loss: Callable[[str], None] | None = None,
    ) -> RollCall:
        """Another process's. Raises LostProcessError where process 0 does not answer in time."""
        here, until = cls(processes, index, on_loss), time.monotonic() + timeout
        while True:
            try:
                peer = socket.create_connection(address, timeout=5)
                break
            except OSError as error:
                if time.monotonic() > until:
                    place = f"{address[0]}:{address[1]}"
                    raise LostProcessError(
                        f"process 0 does not answer at {place} ({error}); is it running, and may "
                        "this host reach that one?"
                    ) from None
                time.sleep(RETRY)
        here._add(0, peer)
        here._send(peer, {"hello": index, "host": platform.node()})
        here._thread.start()
        return here

    @property
    def port(self) -> int:
        """On which process 0 listens."""
        assert self._listener is not None
        return self._listener.getsockname()[1]

    def barrier(self, name: str, timeout: float) -> None:
        """Returns when every process has come here; each name is used once.

        Raises:
          LostProcessError: some have not come in time, or one has ended.
        """
        if self.index == 0:
            with self._changed:
                self._arrive(name, 0)
        else:
            self._send(self._peers[0], {"at": name})
        with self._changed:
            done = self._changed.wait_for(lambda: name in self._open or self.lost, timeout)
            if name in self._open:
                return
            if done:
                raise LostProcessError(str(self.lost))
            arrived = self._arrived.get(name, set())
        if self.index == 0:
            missing = sorted(set(range(self.processes)) - arrived)
            text = (
                f"{_named(missing, self._names)} of {self.processes} not there after "
                f"{timeout:g} s (at {name!r})"
            )
            self._tell({"lost": text})
        else:
            text = f"no word from process 0 after {timeout:g} s (at {name!r})"
        raise LostProcessError(text)

    def on_stop(self, call: Callable[[int], None]) -> None:
        """``call`` is given the signal that another process is asked to stop by, if one is; by
        another thread, unless that was before."""
        with self._changed:
            self._told_to_stop, known = call, self._stop
        if known is not None:
            call(known)

    def ask_to_stop(self, number: int) -> None:
        """Tells all processes that this one was asked to stop by a signal."""
        with self._changed:
            known, self._stop = self._stop, number
        if known is None:
            self._tell({"stop": number})

    def __enter__(self) -> RollCall:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close(None if error is None else f"{type(error).__name__}: {error}".split("\n")[0])

    def close(self, failed: str | None = None) -> None:
        """Leaves; the others are told what ``failed``, if anything did."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        self._tell({"failed": failed} if failed else {"bye": True})
        self._thread.join(timeout=5)
        for peer in (*self._peers.values(), *([self._listener] if self._listener else [])):
            peer.close()
        self._selector.close()

    # What follows runs in the thread.

    def _serve(self) -> None:
        buffers: dict[socket.socket, bytes] = {}
        while not self._closing:
            for key, _ in self._selector.select(timeout=0.2):
                if key.fileobj is self._listener:
                    self._accept()
                    continue
                peer: Any = key.fileobj
                try:
                    data = peer.recv(65536)
                except OSError:
                    data = b""
                *lines, buffers[peer] = (buffers.get(peer, b"") + data).split(b"\n")
                messages = [_message(line) for line in lines]
                if len(buffers[peer]) > LONGEST or None in messages:
                    data, messages = b"", []  # no process of ours: a scan of ports, say
                for message in filter(None, messages):
                    self._hear(peer, message)
                if not data:
                    buffers.pop(peer)
                    self._selector.unregister(peer)
                    self._gone(peer)
                    peer.close()

    def _accept(self) -> None:
        assert self._listener is not None
        peer, _ = self._listener.accept()
        self._prepare(peer)
        self._selector.register(peer, selectors.EVENT_READ)

    def _add(self, index: int, peer: socket.socket) -> None:
        self._prepare(peer)
        self._peers[index] = peer
        self._selector.register(peer, selectors.EVENT_READ)

    def _prepare(self, peer: socket.socket) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in (
            ("TCP_KEEPIDLE", KEEPALIVE // 2),
            ("TCP_KEEPINTVL", 2),
            ("TCP_KEEPCNT", 5),
        ):
            if hasattr(socket, option):  # not everywhere
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

    def _index_of(self, peer: socket.socket) -> int | None:
        return next((i for i, known in self._peers.items() if known is peer), None)

    def _hear(self, peer: socket.socket, message: dict[str, Any]) -> None:
        index = self._index_of(peer)
        if index is None and message.get("hello") in range(1, self.processes):
            index = message["hello"]
            if index not in self._peers:
                self._peers[index], self._names[index] = peer, str(message.get("host"))
                if self._stop is not None:  # all others have been told
                    self._send(peer, {"stop": self._stop})
            return
        if index is None:
            return
        with self._changed:
            if "at" in message:
                self._arrive(message["at"], index)
            elif "open" in message:
                self._open.add(message["open"])
            elif "bye" in message:
                self._left.add(index)
            elif "failed" in message:
                self._left.add(index)
                self._lose(f"{_named([index], self._names)} ended: {message['failed']}")
            elif "lost" in message:
                self._lose(message["lost"])
            elif "stop" in message:
                self._hear_of_stop(message)
            self._changed.notify_all()

    def _hear_of_stop(self, message: dict[str, Any]) -> None:
        if self._stop is not None:
            return
        self._stop = message["stop"]
        if self.index == 0:
            self._tell(message)
        if self._told_to_stop is not None:
            self._told_to_stop(message["stop"])

    def _gone(self, peer: socket.socket) -> None:
        index = self._index_of(peer)
        with self._changed:
            if index is None or index in self._left or self._closing:
                return
            self._lose(f"{_named([index], self._names)} is gone without a word")
            self._changed.notify_all()

    def _arrive(self, name: str, index: int) -> None:
        here = self._arrived.setdefault(name, set())
        here.add(index)
        if len(here) == self.processes:
            self._open.add(name)
            self._tell({"open": name})
            self._changed.notify_all()

    def _lose(self, text: str) -> None:
        if self.lost is not None:
            return
        self.lost = text
        if self.index == 0:
            self._tell({"lost": text})
        if self._on_loss is not None and not self._closing:
            threading.Thread(target=self._on_loss, args=(text,), daemon=True).start()

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers.values()):
            self._send(peer, message)

    def _send(self, peer: socket.socket, message: dict[str, Any]) -> None:
        try:
            peer.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # it is gone: noticed where it is read from


def _message(line: bytes) -> dict[str, Any] | None:
    """None where it is no message."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _named(indices: list[int], names: dict[int, str]) -> str:
    """``process 2 (host a)``; ``processes 1, 3``."""
    said = [f"{i} ({names[i]})" if i in names else str(i) for i in indices]
    return f"process{'es' if len(said) > 1 else ''} {', '.join(said)}"
