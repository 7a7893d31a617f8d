"""``jaxpt launch``: writes what a scheduler needs to train a config on many machines.

It submits nothing. The processes find each other by ``jaxpt.distributed``, a run that was stopped
goes on by the same command, and so every job here may be preempted and queued again.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from jaxpt.errors import ConfigError, Exit
from jaxpt.files import dumps, write_atomic

PORT = 8476  # of process 0, where the scheduler gives none
GRACE = 120  # seconds from the notice to the end: what a save may take


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A batch script for SLURM: one task a node, or one a GPU."""

    nodes: int = 1  # machines
    gpus_per_node: int = 8  # GPUs of each
    tasks_per_node: int = 1  # processes on each
    cpus_per_task: int = 16  # cores of each process
    time: str = "24:00:00"  # limit, as SLURM writes it
    partition: str | None = None  # where to queue
    account: str | None = None  # who pays
    setup: str = ""  # shell command before the run: module load, an environment
    requeues: int = 20  # times that a job stopped by SLURM queues itself again

    def files(self, name: str, command: Sequence[str]) -> dict[str, str]:
        """File name -> content.

        Args:
          name: of the job.
          command: that every process runs.
        """
        _positive(self, "nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task")
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time):
            raise ConfigError("--time", f"{self.time!r} is not [DAYS-]HH:MM:SS or minutes")
        if self.gpus_per_node % self.tasks_per_node:
            raise ConfigError(
                "--tasks-per-node", f"{self.tasks_per_node} does not divide the GPUs of a node"
            )
        options = {
            "job-name": name,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "output": "%x-%j.out",
            "open-mode": "append",
            "signal": f"TERM@{GRACE}",
            "requeue": "",
        }
        lines = [
            f"#SBATCH --{option}{f'={value}' if value else ''}"
            for option, value in options.items()
            if value is not None
        ]
        script = SLURM.format(
            options="\n".join(lines),
            setup=self.setup,
            command=shlex.join(command),
            stopped=int(Exit.TERMINATED),
            requeues=self.requeues,
        )
        return {f"{name}.sbatch": script}

    def submit(self, name: str) -> list[str]:
        """Commands for the user to type."""
        return [f"sbatch {name}.sbatch"]


SLURM = """#!/usr/bin/env bash
{options}
# SLURM sends SIGTERM before the time is up or the nodes are taken: the run saves and exits with
# {stopped}, and the job queues itself again. Submitted once more by hand it goes on, too.
set -uo pipefail
{setup}
srun --kill-on-bad-exit=1 {command}
code=$?
if [ "$code" -eq {stopped} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclasses.dataclass(frozen=True)
class Gke:
    """A JobSet for Kubernetes on Google Cloud: TPU slices, or machines with GPUs."""

    image: str = ""  # container image with jaxpt installed
    # GKE's name of the chip: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, nvidia-h100-80gb
    accelerator: str = "tpu-v5-lite-podslice"
    topology: str = "4x4"  # of a TPU slice; not for GPUs
    chips_per_host: int = 4  # TPU chips or GPUs of a machine
    slices: int = 1  # TPU slices; with GPUs, machines
    claim: str = ""  # persistent volume claim that all machines can write to (Filestore, NFS)
    mount: str = "/runs"  # where it is mounted; --workdir lies in it
    retries: int = 20  # times that the JobSet begins again after a failure or a preemption
    namespace: str = "default"  # where it runs

    def files(self, name: str, command: Sequence[str]) -> dict[str, str]:
        """File name -> content; see ``Slurm.files``."""
        _positive(self, "chips_per_host", "slices")
        if not self.image:
            raise ConfigError("--image", "missing; give a container image with jaxpt installed")
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", name):
            raise ConfigError(
                "--job-name", f"{name!r} is not a Kubernetes name: letters a-z, digits and -"
            )
        if not self.claim:
            raise ConfigError("--claim", "missing; give the claim of a volume for the run's folder")
        _inside(command, self.mount)
        tpu = self.accelerator.startswith("tpu-")
        values = {
            "name": name,
            "namespace": self.namespace,
            "retries": self.retries,
            "grace": GRACE,
            "image": _quoted(self.image),
            "command": "[" + ", ".join(map(_quoted, command)) + "]",
            "resource": "google.com/tpu" if tpu else "nvidia.com/gpu",
            "chips": self.chips_per_host,
            "claim": _quoted(self.claim),
            "mount": _quoted(self.mount),
        }
        if tpu:
            chips = _product(self.topology)
            if chips % self.chips_per_host:
                raise ConfigError(
                    "--chips-per-host", f"{self.chips_per_host} does not divide {self.topology}"
                )
            selector = {
                "cloud.google.com/gke-tpu-accelerator": self.accelerator,
                "cloud.google.com/gke-tpu-topology": self.topology,
            }
            # GKE tells the processes of a slice, and of several, where the others are.
            return self._file(
                values, self.slices, chips // self.chips_per_host, selector, environment=""
            )
        selector = {"cloud.google.com/gke-accelerator": self.accelerator}
        environment = GPU_ENVIRONMENT.format(name=name, port=PORT, machines=self.slices)
        return self._file(values, 1, self.slices, selector, environment)

    def _file(self, values, slices: int, hosts: int, selector, environment: str):
        nodes = "\n".join(f"              {key}: {_quoted(v)}" for key, v in selector.items())
        text = JOBSET.format(
            **values, slices=slices, hosts=hosts, selector=nodes, environment=environment
        )
        return {f"{values['name']}.yaml": text}

    def submit(self, name: str) -> list[str]:
        return [f"kubectl apply -f {name}.yaml"]


JOBSET = """apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  namespace: {namespace}
spec:
  # A run that begins again goes on from its last checkpoint.
  failurePolicy:
    maxRestarts: {retries}
  replicatedJobs:
  - name: workers
    replicas: {slices}
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        completionMode: Indexed
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {grace}
            nodeSelector:
{selector}
            containers:
            - name: train
              image: {image}
              command: {command}
{environment}              resources:
                limits:
                  {resource}: {chips}
              volumeMounts:
              - name: runs
                mountPath: {mount}
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: {claim}
"""

GPU_ENVIRONMENT = """              env:
              - name: JAX_COORDINATOR_ADDRESS
                value: "{name}-workers-0-0.{name}:{port}"
              - name: JAX_NUM_PROCESSES
                value: "{machines}"
              - name: JAX_PROCESS_ID
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
"""


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """Commands for Google Cloud's TPU VMs: make a slice, install, train on all its hosts."""

    type: str = "v5litepod-16"  # gcloud's name of the slice
    zone: str = ""  # where, us-west4-a say
    project: str | None = None  # whose; None: gcloud's default
    version: str = "v2-alpha-tpuv5-lite"  # image of the machines
    source: str = ""  # where jaxpt is cloned from (git), with your configs
    nfs: str = ""  # HOST:/SHARE that all machines can write to (Filestore)
    mount: str = "/mnt/runs"  # where it is mounted; --workdir lies in it
    spot: bool = False  # whether the slice may be taken away; then it costs less

    def files(self, name: str, command: Sequence[str]) -> dict[str, str]:
        """File name -> content; see ``Slurm.files``."""
        examples = {"zone": "us-west4-a, say", "source": "a git URL", "nfs": "HOST:/SHARE"}
        for field, example in examples.items():
            if not getattr(self, field):
                raise ConfigError(f"--{field}", f"missing; give {example}")
        _inside(command, self.mount)
        where = f"--zone {shlex.quote(self.zone)}"
        where += f" --project {shlex.quote(self.project)}" if self.project else ""
        folder, mount = "~/jaxpt", shlex.quote(self.mount)
        install = (
            f"test -d {folder} || git clone {shlex.quote(self.source)} {folder}; "
            f"cd {folder} && git pull --ff-only && python3 -m venv ~/env && "
            "~/env/bin/pip install -q -e '.[tpu]' && "
            f"sudo mkdir -p {mount} && (mountpoint -q {mount} || "
            f"sudo mount -t nfs {shlex.quote(self.nfs)} {mount})"
        )
        train = f"cd {folder} && PATH=~/env/bin:$PATH {shlex.join(command)}"
        return {
            f"{name}-tpu-vm.sh": TPU_VM.format(
                name=shlex.quote(name),
                where=where,
                type=shlex.quote(self.type),
                version=shlex.quote(self.version),
                spot=" --spot" if self.spot else "",
                install=shlex.quote(install),
                train=shlex.quote(train),
            )
        }

    def submit(self, name: str) -> list[str]:
        return [f"bash {name}-tpu-vm.sh"]


TPU_VM = """#!/usr/bin/env bash
# Makes the slice unless it is there, installs jaxpt on every host, and trains. If the slice is
# taken away, run this again: the run goes on from its last checkpoint. When done:
#   gcloud compute tpus tpu-vm delete {name} {where}
set -euo pipefail
gcloud compute tpus tpu-vm describe {name} {where} > /dev/null 2>&1 ||
  gcloud compute tpus tpu-vm create {name} {where} \\
    --accelerator-type {type} --version {version}{spot}
gcloud compute tpus tpu-vm ssh {name} {where} --worker all --command {install}
gcloud compute tpus tpu-vm ssh {name} {where} --worker all --command {train}
"""

KINDS: dict[str, type[Slurm] | type[Gke] | type[TpuVm]] = {
    "slurm": Slurm,
    "gke": Gke,
    "tpu-vm": TpuVm,
}


def main(
    job: Slurm | Gke | TpuVm,
    config: Path,
    overrides: Sequence[str],
    *,
    workdir: str,
    name: str,
    out: Path,
    json: bool,
) -> int:
    """``jaxpt launch``: writes the files into ``out`` and prints them.

    Args:
      job: what kind, and its options.
      config: the config's path, as the machines will see it.
      overrides: flags of ``jaxpt train``, which have been found valid.
      workdir: the run's folder, which all machines must share.
      name: of the job.

    Raises:
      ConfigError: an option that cannot be; nothing has been written then.
    """
    command = ["jaxpt", "train", str(config), "--workdir", workdir, *overrides]
    files = job.files(name, command)
    out.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        write_atomic(out / file, text)
    if json:
        print(dumps({"files": files, "folder": str(out), "submit": job.submit(name)}))
        return Exit.OK
    for file, text in files.items():
        print(f"# {out / file}\n{text}")
    print(f"Written to {out}; nothing was submitted. To submit, from there: ", end="")
    print("; ".join(job.submit(name)))
    return Exit.OK


def _positive(job: object, *fields: str) -> None:
    for field in fields:
        value = getattr(job, field)
        if value < 1:
            raise ConfigError(
                f"--{field.replace('_', '-')}", f"{value} is not valid; give 1 or more"
            )


def _inside(command: Sequence[str], mount: str) -> None:
    """Raises ConfigError unless the run's folder lies where the shared volume is mounted."""
    workdir = Path(command[command.index("--workdir") + 1])
    if not workdir.is_relative_to(mount):
        raise ConfigError(
            "--workdir", f"{workdir} is not in {mount}, where the shared volume is mounted"
        )


def _product(topology: str) -> int:
    if not re.fullmatch(r"\d+x\d+(x\d+)?", topology):
        raise ConfigError("--topology", f"{topology!r} is not like 4x4 or 2x2x4")
    chips = 1
    for n in topology.split("x"):
        chips *= int(n)
    return chips


def _quoted(text: str) -> str:
    """A string as YAML and JSON both have it."""
    return dumps(text)
