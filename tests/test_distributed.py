"""How several processes find each other, decide alike, and hear of one that is lost."""

import concurrent.futures
import dataclasses
import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest
from tiny import tiny_run

from jaxpt import distributed
from jaxpt.distributed import Cluster, Session, Wishes, detect
from jaxpt.errors import ConfigError, Exit, LostProcessError
from jaxpt.files import read_json, read_metrics
from jaxpt.rollcall import RollCall, meet
from jaxpt.run import to_json
from jaxpt.train import train

SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_NODELIST": "gpu[03-05,9]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
COORDINATOR = {"JAX_COORDINATOR_ADDRESS": "head:8476"}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        (SLURM, Cluster("SLURM", 4, 2, ("gpu03", 24567))),
        (SLURM | {"SLURM_STEP_NODELIST": "n1-a,n2-a"}, Cluster("SLURM", 4, 2, ("n1-a", 24567))),
        (SLURM | {"SLURM_STEP_NODELIST": "n[1-2].x"}, Cluster("SLURM", 4, 2, ("n1.x", 24567))),
        (SLURM | COORDINATOR, Cluster("SLURM", 4, 2, ("head", 8476))),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # one task of a job of several
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None),  # a shell inside an allocation
        (MPI | COORDINATOR, Cluster("Open MPI", 2, 1, ("head", 8476))),
        (
            COORDINATOR | {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"},
            Cluster("JAX_NUM_PROCESSES", 3, 0, ("head", 8476)),
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, Cluster("a TPU pod")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, Cluster("TPU slices")),
    ],
    ids=str,
)
def test_detects_where_it_runs(environ, found):
    assert detect(environ) == found


def test_flags_come_first_and_are_checked():
    assert detect(SLURM, "h:1", 2, 1) == Cluster("flags", 2, 1, ("h", 1))
    assert detect({}, "h:1", 1, 0) is None
    assert detect({}, workers=lambda: 4) == Cluster("a TPU pod")
    for flags, field in (
        (("h:1", None, 0), "--processes"),
        ((None, 2, 0), "--coordinator"),
        (("h:1", 2, 2), "--process-id"),
        (("h", 2, 0), "--coordinator"),
    ):
        with pytest.raises(ConfigError, match=field):
            detect({}, *flags)
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS"):
        detect(MPI)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(*calls):
    """Each in a thread of its own; their results or errors."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [f.exception() or f.result() for f in futures]


def test_all_meet():
    address = ("127.0.0.1", free_port())
    found = together(*(lambda i=i: meet(address, 4, i, 20) for i in (3, 1, 0, 2)))
    assert found == [None] * 4
    assert together(*(lambda i=i: meet(address, 2, i, 20) for i in (0, 1))) == [None] * 2


def test_who_does_not_come_is_named_by_all():
    address = ("127.0.0.1", free_port())
    found = together(
        *(lambda i=i, t=t: meet(address, 5, i, t) for i, t in ((0, 1), (2, 9), (4, 9)))
    )
    for error in found:
        assert isinstance(error, LostProcessError)
        assert "processes 1, 3 of 5 not there after 1 s" in str(error)
    with pytest.raises(LostProcessError, match=r"process 0 does not answer at 127\.0\.0\.1"):
        meet(("127.0.0.1", free_port()), 2, 1, 0.3)


def hosted(processes, on_loss=None):
    return RollCall.host(processes, ("127.0.0.1", 0), on_loss)


def joined(here, index, on_loss=None):
    return RollCall.join(("127.0.0.1", here.port), here.processes, index, 10, on_loss)


def test_a_failure_is_told_to_all():
    losses: list[str] = []

    def fail(zero):
        with joined(zero, 2) as two:
            two.barrier("a", 10)
            raise ValueError("bad luck\nand more")

    with hosted(3, losses.append) as zero, joined(zero, 1) as one:
        calls = [lambda r=r: r.barrier("a", 10) for r in (zero, one)]
        assert isinstance(together(*calls, lambda: fail(zero))[2], ValueError)
        for error in together(*(lambda r=r: r.barrier("b", 10) for r in (zero, one))):
            with pytest.raises(
                LostProcessError, match=r"process 2 \(.*\) ended: ValueError: bad luck$"
            ):
                raise error
        assert len(losses) == 1


def test_strangers_are_not_listened_to():
    """What scans ports, or is of another run, neither breaks the roll call nor takes a place."""
    with hosted(2) as zero, joined(zero, 1) as one:
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"x" * 100_000, b'{"hello": 7}\n'):
            with socket.create_connection(("127.0.0.1", zero.port)) as stranger:
                stranger.sendall(said)
        with socket.create_connection(("127.0.0.1", zero.port)) as stranger:
            stranger.sendall(b'{"hello": 1, "host": "x"}\n{"at": "a"}\n{"failed": "x"}\n')
            time.sleep(0.2)
        assert together(*(lambda r=r: r.barrier("a", 10) for r in (zero, one))) == [None] * 2
        assert zero.lost is None


def test_an_end_in_order_is_no_loss():
    with hosted(2) as zero, joined(zero, 1) as one:
        assert together(*(lambda r=r: r.barrier("end", 10) for r in (zero, one))) == [None] * 2
        one.close()
        time.sleep(0.3)
        assert zero.lost is None


def test_alone_decides_at_once():
    with distributed.session() as alone:
        assert alone.first
        alone.barrier("anything")
        for agree in (alone.agree, alone.agree_now):
            assert agree(Wishes(save=True)) == Wishes(save=True)
        with pytest.raises(ZeroDivisionError), alone.watching():
            raise ZeroDivisionError


# Real processes.

WORKER = """
    import os, signal, sys
    config, folder, port, n, i, stop = sys.argv[1:]
    import jax
    jax.config.update("jax_num_cpu_devices", 4 // int(n))
    from jaxpt import train as loop
    from jaxpt.cli import main
    from jaxpt.run import from_json
    log = loop.MonitorSession.log
    def signalled(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if (step, int(i)) == (int(stop), int(n) - 1):  # the others do not get it
            os.kill(os.getpid(), signal.SIGTERM)
    loop.MonitorSession.log = signalled
    from jaxpt import cli
    run = from_json(open(config).read())
    def train(args):
        flags = ("127.0.0.1:" + port, int(n), int(i)) if int(n) > 1 else (None, None, None)
        names = ("coordinator", "processes", "process_id")
        return loop.main(run, workdir=folder, **dict(zip(names, flags)))
    cli.COMMANDS["train"] = ("", "", train)
    sys.exit(main(["train"]))
"""


def launched(run, folder, processes: int, stop: int):
    """Exit codes and stderrs of as many processes, on four devices together."""
    folder.parent.mkdir(exist_ok=True)
    config = folder.parent / "run.json"
    config.write_text(to_json(run))
    port = str(free_port())
    environ = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", textwrap.dedent(WORKER), str(config), str(folder), port),
                *(str(processes), str(i), str(stop)),
            ],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    ends = [process.communicate(timeout=300)[1] for process in started]
    return [process.returncode for process in started], ends


def mesh(run, **sizes):
    sizes = {"devices": None} | sizes
    return dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, **sizes))


def losses(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_four_processes_then_two_then_one_are_the_run_of_one(tmp_path):
    """Stopped by a signal to one of them, which all obey; another mesh each time."""
    run = tiny_run(tmp_path, **{"loader.shards": 4, "checkpoint.keep": 9})
    train(run, tmp_path / "straight")
    folder = tmp_path / "several" / "run"
    codes, ends = launched(mesh(run, data=4), folder, 4, stop=2)
    assert codes == [Exit.TERMINATED] * 4, ends
    assert read_json(folder / "status.json")["state"] == "stopped"
    assert 2 <= max(losses(folder)) <= 4  # agreed on a step later
    codes, ends = launched(mesh(run, data=2, fsdp=2), folder, 2, stop=4)
    assert codes == [Exit.TERMINATED] * 2, ends
    train(mesh(run, data=1, fsdp=4, devices=4), folder)
    straight, several = losses(tmp_path / "straight"), losses(folder)
    assert list(several) == list(straight) == [1, 2, 3, 4, 5, 6]
    for step, loss in straight.items():
        assert several[step] == pytest.approx(loss, rel=1e-5), step


def test_a_session_of_one_costs_no_thread():
    assert Session().roll is None
