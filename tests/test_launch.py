"""``jaxpt launch`` writes files that their schedulers can read, with a command that is valid."""

import json
import shlex
import subprocess

import pytest
import yaml

from jaxpt import cli, signals
from jaxpt.errors import Exit
from jaxpt.launch import GRACE

CONFIG = "configs/ul2_tiny.py"
RUN = ["--workdir", "/runs/a b", "--optimizer.lr", "1e-3", "--model.scan"]
COMMAND = ["jaxpt", "train", CONFIG, *RUN]


def launch(capsys, kind, *args):
    """(exit code, what it printed)."""
    code = cli.main(["launch", kind, CONFIG, *args])
    said = capsys.readouterr()
    return code, json.loads(said.out) if code == Exit.OK else said.err


def test_slurm(tmp_path, capsys):
    code, said = launch(
        capsys, "slurm", *RUN, "--out", str(tmp_path), "--json", "--nodes", "4", "--account=me"
    )
    assert code == Exit.OK
    ((name, script),) = said["files"].items()
    assert (tmp_path / name).read_text() == script
    assert said["submit"] == ["sbatch ul2-tiny.sbatch"]
    subprocess.run(["bash", "-n", str(tmp_path / name)], check=True)
    options = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert "#SBATCH --nodes=4" in options
    assert "#SBATCH --account=me" in options
    assert "#SBATCH --requeue" in options
    assert f"#SBATCH --signal=TERM@{GRACE}" in options  # to the processes, not to this script
    assert GRACE > 2 * signals.GRACE
    assert not any("partition" in option for option in options)
    (run,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert shlex.split(run)[2:] == COMMAND


@pytest.mark.parametrize("stopped", [True, False])
def test_slurm_queues_again_what_was_stopped(tmp_path, capsys, stopped):
    """The script run with stand-ins for srun and scontrol."""
    launch(capsys, "slurm", *RUN, "--out", str(tmp_path), "--json")
    code = int(Exit.TERMINATED) if stopped else int(Exit.DATA)
    for name, text in (("srun", f"exit {code}"), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "ul2-tiny.sbatch")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stdout.split() == (["requeue", "7"] if stopped else [])


GKE = ["--image", "registry/x:1", "--claim", "disk"]


def jobset(said):
    ((_, text),) = said["files"].items()
    found = yaml.safe_load(text)
    (job,) = found["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    return found, job, inner, inner["template"]["spec"]


def test_gke_on_tpus(tmp_path, capsys):
    code, said = launch(
        capsys,
        "gke",
        *(*RUN, *GKE, "--out", str(tmp_path), "--json", "--topology", "4x8", "--slices", "2"),
    )
    assert code == Exit.OK
    found, job, inner, pod = jobset(said)
    assert found["metadata"]["name"] == "ul2-tiny"
    assert job["replicas"] == 2
    assert inner["parallelism"] == inner["completions"] == 8
    (container,) = pod["containers"]
    assert container["command"] == COMMAND
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}


def test_gke_on_gpus_says_where_process_0_is(tmp_path, capsys):
    """In the variables that ``distributed.detect`` reads."""
    from jaxpt.distributed import Cluster, detect

    args = ["--accelerator", "nvidia-h100-80gb", "--chips-per-host", "8", "--slices", "2"]
    _, said = launch(
        capsys, "gke", *RUN, *GKE, *args, "--out", str(tmp_path), "--json", "--job-name", "big"
    )
    _, job, inner, pod = jobset(said)
    assert (job["replicas"], inner["parallelism"]) == (1, 2)
    environment = {e["name"]: e.get("value", "1") for e in pod["containers"][0]["env"]}
    assert detect(environment) == Cluster("JAX_NUM_PROCESSES", 2, 1, ("big-workers-0-0.big", 8476))


def test_tpu_vm(tmp_path, capsys):
    args = ["--zone", "z", "--source", "https://x/y", "--nfs", "h:/s", "--mount", "/runs"]
    code, said = launch(capsys, "tpu-vm", *RUN, *args, "--out", str(tmp_path), "--json", "--spot")
    assert code == Exit.OK
    ((name, script),) = said["files"].items()
    subprocess.run(["bash", "-n", str(tmp_path / name)], check=True)
    *_, install, train = script.splitlines()
    assert shlex.split(shlex.split(train)[-1])[-len(COMMAND) :] == COMMAND
    assert "mount -t nfs h:/s /runs" in install
    assert "--spot" in script


@pytest.mark.parametrize(
    ("kind", "args", "field"),
    [
        ("slurm", [], "--workdir"),
        ("slurm", ["--workdir", "gs://bucket/run"], "--workdir"),
        ("slurm", [*RUN, "--optimizer.learning_rate", "1"], "--optimizer.learning_rate"),
        ("slurm", [*RUN, "--nodes", "0"], "--nodes"),
        ("slurm", [*RUN, "--time", "a day"], "--time"),
        ("gke", RUN, "--image"),
        ("gke", [*RUN, "--image", "x"], "--claim"),
        ("gke", [*RUN, *GKE, "--mount", "/other"], "--workdir"),
        ("gke", [*RUN, *GKE, "--topology", "3"], "--topology"),
        ("gke", [*RUN, *GKE, "--job-name", "A_B"], "--job-name"),
        ("tpu-vm", RUN, "--zone"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_written(tmp_path, capsys, kind, args, field):
    code, said = launch(capsys, kind, *args, "--out", str(tmp_path / "out"))
    assert code == Exit.CONFIG
    assert said.startswith(f"error: {field}: ")
    assert not (tmp_path / "out").exists()
