"""Several processes that train one run: how they find each other, decide alike, and end together.

``start`` finds out from the environment (SLURM, Open MPI, a TPU pod, ``JAX_COORDINATOR_ADDRESS``)
or is told by flags, and hands over to ``jax.distributed``. ``session`` is what a run does between
its beginning and its end; in a single process all of it costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpt.errors import ConfigError, Exit, LostProcessError
from jaxpt.rollcall import Address, RollCall, meet
from jaxpt.signals import StopRequest

START = 300.0  # seconds in which all processes have to come
GRACE = 15.0  # seconds that a process has to end in order when another is lost
AGAIN = "; start all processes again to go on from the last checkpoint"
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the processes are. ``address`` is process 0's, None where JAX itself knows it."""

    by: str  # who said so
    processes: int | None = None
    index: int | None = None  # of this process
    address: Address | None = None


def detect(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    workers: Callable[[], int] | None = None,
) -> Cluster | None:
    """The processes that this one is of; None where it is alone.

    Args:
      environ: environment variables.
      coordinator: HOST:PORT of process 0, processes: how many, process_id: which one this is;
        all three or none, by flags.
      workers: the number of hosts of this TPU pod; asked where nothing else is known.

    Raises:
      ConfigError: flags or variables that do not fit each other.
    """
    given = {"coordinator": coordinator, "processes": processes, "process-id": process_id}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ConfigError(f"--{missing[0]}", "missing; give all of " + ", ".join(given))
    else:
        return _checked("flags", coordinator, processes, process_id)
    coordinator = environ.get("JAX_COORDINATOR_ADDRESS")
    if environ.get("JAX_NUM_PROCESSES"):
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        return _checked("JAX_NUM_PROCESSES", *(environ.get(name) for name in names))
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _checked(
            "SLURM",
            coordinator or f"{_first_host(environ['SLURM_STEP_NODELIST'])}:{_port(environ)}",
            environ["SLURM_STEP_NUM_TASKS"],
            environ["SLURM_PROCID"],
        )
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if coordinator is None:
            raise ConfigError(
                "JAX_COORDINATOR_ADDRESS",
                "missing; under Open MPI set it to HOST:PORT of rank 0 (mpirun -x ...)",
            )
        rank = environ["OMPI_COMM_WORLD_RANK"]
        return _checked("Open MPI", coordinator, environ["OMPI_COMM_WORLD_SIZE"], rank)
    if int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1:
        return Cluster("TPU slices")
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or (workers and workers() > 1):
        return Cluster("a TPU pod")
    return None


def _checked(by: str, coordinator: Any, processes: Any, index: Any) -> Cluster | None:
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError("--coordinator", f"{coordinator} is not HOST:PORT (by {by})")
    processes, index = int(processes), int(index)
    if not 0 <= index < processes:
        raise ConfigError(
            "--process-id", f"{index} is not valid for {processes} processes (by {by})"
        )
    return Cluster(by, processes, index, (host, int(port))) if processes > 1 else None


def _first_host(nodes: str) -> str:
    """Of SLURM's short form: ``gpu[03-05,9],cpu1`` -> ``gpu03``."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise ConfigError("SLURM_STEP_NODELIST", f"{nodes!r} names no host")
    return "".join(part or "" for part in found.groups())


def _port(environ: Mapping[str, str]) -> int:
    """One that other jobs on the host are unlikely to take."""
    return 20000 + int(environ.get("SLURM_JOB_ID", 0)) % 10000


def on_tpu_vm() -> bool:
    """Whether Google Cloud's metadata server may be asked: this machine has TPUs and libtpu."""
    tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")
    skip = os.environ.get("TPU_SKIP_MDS_QUERY")
    return bool(tpu) and not skip and importlib.util.find_spec("libtpu") is not None


def pod_workers() -> int:
    """Hosts of the TPU pod slice that this machine is of, by Google Cloud's metadata; else 1."""
    if not on_tpu_vm():
        return 1
    request = urllib.request.Request(
        METADATA + "attributes/worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return len(answer.read().decode().split(","))
    except (urllib.error.URLError, TimeoutError):  # no such server: not on Google Cloud
        return 1


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    timeout: float = START,
) -> Cluster | None:
    """Joins the other processes, if there are any; before anything else is done with JAX.

    Args:
      coordinator, processes, process_id: as for ``detect``.
      timeout: seconds in which all have to come.

    Raises:
      ConfigError: flags or variables that do not fit each other.
      LostProcessError: a process has not come; the message names it.
    """
    cluster = detect(os.environ, coordinator, processes, process_id, pod_workers)
    if cluster is None or jax.distributed.is_initialized():
        return cluster
    known: dict[str, Any] = {}
    if cluster.address is not None:
        assert cluster.processes is not None
        assert cluster.index is not None
        meet(cluster.address, cluster.processes, cluster.index, timeout)
        host, port = cluster.address
        known = {
            "coordinator_address": f"{host}:{port}",
            "num_processes": cluster.processes,
            "process_id": cluster.index,
        }
        if cluster.by in ("flags", "JAX_NUM_PROCESSES"):
            known["cluster_detection_method"] = "deactivate"
    jax.distributed.initialize(initialization_timeout=int(timeout), **known)
    return cluster


@dataclasses.dataclass
class Wishes:
    """What a process would have all of them do after a step."""

    stop: bool = False
    over: bool = False  # end the phase
    evaluate: bool = False
    save: bool = False


class Session:
    """What the processes of a run do together, from its beginning to its end."""

    def __init__(self, roll: RollCall | None = None):
        self.roll = roll
        # Called with the cause where this process is ended because another is lost.
        self.ending: Callable[[str], None] | None = None
        self.first, self.alone = jax.process_index() == 0, roll is None
        self._pending: jax.Array | None = None
        self._stop_pending: jax.Array | None = None
        if roll is not None:
            devices = np.array(jax.devices())
            mesh = Mesh(devices, ("process",))
            self._rows = NamedSharding(mesh, PartitionSpec("process"))
            self._any = jax.jit(
                lambda x: x.max(0), out_shardings=NamedSharding(mesh, PartitionSpec())
            )

    def barrier(self, name: str, timeout: float = START) -> None:
        """Waits for all processes; see ``RollCall.barrier``."""
        if self.roll is not None:
            self.roll.barrier(name, timeout)

    def share(self, stop: StopRequest) -> None:
        """A stop that one process is asked for is asked of all: at once, wherever they are.

        After which step they stop is for ``agree`` to say.
        """
        if self.roll is not None:
            stop.told = self.roll.ask_to_stop
            self.roll.on_stop(lambda number: stop.request(number, "a signal to another process"))

    def agree(self, wishes: Wishes) -> Wishes:
        """What any process wished: at once where there is one, else a step later, so that
        nobody waits. Called by all processes after every step."""
        if self.roll is None:
            return wishes
        before, self._pending = self._pending, self._ask(wishes)
        return Wishes() if before is None else _read(before)

    def agree_now(self, wishes: Wishes) -> Wishes:
        """The same, with an answer at once: waits for what the devices do."""
        if self.roll is None:
            return wishes
        self._pending = None
        return _read(self._ask(wishes))

    def agree_to_stop(self, stop: bool) -> bool:
        """Whether any process has been asked to, for what has no steps: ``agree`` in between is
        not disturbed. With several, the answer is that to the call before."""
        if self.roll is None:
            return stop
        before, self._stop_pending = self._stop_pending, self._ask(Wishes(stop=stop))
        return before is not None and _read(before).stop

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Errors that come of the loss of another process, as LostProcessError."""
        try:
            yield
        except Exception as error:
            # A collective operation fails a little before it is known who is lost.
            until = time.monotonic() + 2
            while self.roll and not self.roll.lost and time.monotonic() < until:
                if not _of_a_peer(error):
                    break
                time.sleep(0.05)
            if self.roll and self.roll.lost and not isinstance(error, LostProcessError):
                raise LostProcessError(self.roll.lost) from error
            raise

    def _ask(self, wishes: Wishes) -> jax.Array:
        row = np.array([dataclasses.astuple(wishes)], np.int32)
        rows = np.repeat(row, jax.local_device_count(), axis=0)
        return self._any(jax.make_array_from_process_local_data(self._rows, rows))


def _read(answer: jax.Array) -> Wishes:
    return Wishes(*(bool(x) for x in np.asarray(answer)))


@contextlib.contextmanager
def session(grace: float = GRACE) -> Iterator[Session]:
    """The run's. Where a process is lost, the others hear of it, and have ``grace`` seconds to end:
    then they are ended, as they may hang in a collective operation that will never be done."""
    if jax.process_count() == 1:
        yield Session()
        return

    here: list[Session] = []

    def on_loss(text: str) -> None:
        time.sleep(grace)
        try:
            if here and here[0].ending is not None:
                here[0].ending(text)
        finally:
            print(f"error: {text}{AGAIN}", file=sys.stderr, flush=True)
            os._exit(Exit.LOST_PROCESS)

    with _roll_call(on_loss) as roll:
        here.append(Session(roll))
        yield here[0]
        roll.barrier("end", START)


def _of_a_peer(error: Exception) -> bool:
    return bool(re.search(r"(?i)gloo|nccl|connection|peer|coordination|UNAVAILABLE", str(error)))


def _roll_call(on_loss: Callable[[str], None]) -> RollCall:
    """Process 0 tells the others where it listens."""
    processes, index = jax.process_count(), jax.process_index()
    here = None
    told = np.zeros(256, np.uint8)
    if index == 0:
        here = RollCall.host(processes, ("", 0), on_loss)
        text = f"{_own_address()}:{here.port}".encode()
        told[: len(text)] = np.frombuffer(text, np.uint8)
    answer = np.asarray(multihost_utils.broadcast_one_to_all(told)).astype(np.uint8)
    if here is None:
        host, _, port = answer.tobytes().rstrip(b"\0").decode().rpartition(":")
        here = RollCall.join((host, int(port)), processes, index, START, on_loss)
    return here


def _own_address() -> str:
    """By which other hosts reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))  # nothing is sent
            return probe.getsockname()[0]
        except OSError:  # no route to anywhere else
            return socket.gethostname()
