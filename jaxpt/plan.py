"""What a phase's train step takes on chips that are not here: compiled ahead of time for a
described topology, on a machine with neither TPU nor GPU.

    plan(program_on(run, "v5p:2x2x1"))

A topology is a chip and how many of them: ``v5p:2x2x1`` as libtpu names it, or a number, ``v5e:1``
or ``h100:8`` (GPUs, eight of a host). TPUs take libtpu (``pip install "jax[tpu]"``), GPUs JAX's
CUDA plugin (``pip install "jax[cuda12]"``).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from jaxpt import hardware
from jaxpt.errors import ConfigError
from jaxpt.expected import Asked, Held, compare, expected
from jaxpt.hardware import Chip
from jaxpt.hlo import Collective, carried, traffic
from jaxpt.operations import operations
from jaxpt.program import Program
from jaxpt.run import Run
from jaxpt.state import flatten

# The smallest topology that libtpu describes: one host's chips.
HOST = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}
GPUS_OF_HOST = 8

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 1 patch: 1 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
# What a driver says of the chip, in XLA's text format for target configurations.
GPUS = {
    "h100": _GPU.format(name="NVIDIA H100 80GB HBM3", memory=84978434048, bandwidth=3352320000000),
    "h200": _GPU.format(name="NVIDIA H200", memory=150109880320, bandwidth=4800000000000),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of one device, in bytes, as the compiler has it.

    device: its kind, as JAX names it.
    devices: how many there are.
    mesh: sizes of the mesh axes.
    parameters, state: of the arguments: the parameters, and what the optimizer and the updates
      keep.
    gradients: of what is trained, as large as the parameters: of the temporaries where all are
      there at once, before the update.
    carried: of the temporaries, what the layers' backward pass carries, by origin: activations that
      are ``kept``, gradients that are ``made``, ``copies`` of parameters; {} where layers are not
      scanned.
    aliased: outputs that take the place of arguments.
    flops: of a step, on all devices: the model's own, whatever the compiled program adds.
    operations: of a step, on all devices, that the program has, what is computed again too.
    moved: between memory and cores.
    collectives: exchanges with other devices.
    asked: those that the sharding asks for, by formula; None where there is none for the model.
    across: of what is sent in them, bytes that go to other hosts by a slower network.
    loops: those whose length the compiled program does not say: what they move and exchange is
      counted once.
    tokens: positions of a step, on all devices.
    steps: of the phase; None where that is not known beforehand.
    seconds: that the compilation took.
    """

    device: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    state: int
    gradients: int
    arguments: int
    outputs: int
    temporaries: int
    carried: dict[str, int]
    aliased: int
    flops: float
    operations: float
    moved: int
    collectives: tuple[Collective, ...]
    asked: tuple[Asked, ...] | None
    across: float
    loops: tuple[str, ...]
    tokens: int
    steps: int | None
    seconds: float

    @property
    def peak(self) -> int:
        """Arguments, outputs and temporaries, what is aliased counted once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    @property
    def chip(self) -> Chip | None:
        return hardware.chip(self.device)

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the memory of the chip's data sheet."""
        return None if self.chip is None else self.peak <= self.chip.memory

    @property
    def held(self) -> tuple[list[Held], bool] | None:
        """The exchanges beside what the formula asks for, and whether it explains them."""
        return None if self.asked is None else compare(self.collectives, self.asked)

    def floors(self, share: float = 1.0) -> dict[str, float]:
        """Seconds that a step takes at least by what it computes, at this share of the chip's peak;
        by what it moves between memory and cores; and by what it sends to other devices over all
        links at once. What XLA keeps in fast memory, and what it does at the same time, it does not
        know. {} where the chip is not known."""
        if self.chip is None:
            return {}
        sent = sum(each.sent for each in self.collectives) - self.across
        found = {
            "compute": self.operations / self.devices / (share * self.chip.flops),
            "memory": self.moved / self.chip.bandwidth,
        }
        if sent and self.chip.interconnect:
            found["interconnect"] = sent / self.chip.interconnect
        if self.across and self.chip.network:
            found["network"] = self.across / self.chip.network
        return found


def plan(program: Program) -> Plan:
    """Compiles the program's train step for its mesh, and reads off what it takes.

    Raises:
      DoesNotFit: the compiler has found no way to fit it into the chip's memory.
    """
    began = time.perf_counter()
    try:
        compiled = program.train_step.program
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_said(str(error))) from None
    seconds = time.perf_counter() - began
    layout, state = program.layout, program.abstract
    with layout.active():
        traced = jax.make_jaxpr(program.step_function)(
            state, program.abstract_batch, jax.eval_shape(lambda: jax.random.key(0))
        )
    analysis = compiled.memory_analysis()
    mesh = {name: int(size) for name, size in layout.mesh.shape.items()}
    device = layout.mesh.devices.flat[0]
    text = compiled.as_text()
    found = traffic(text, mesh, GPUS_OF_HOST if device.platform == "gpu" else None)
    trained = [
        leaf for path, leaf in flatten(state.params).items() if program.model.tensors[path].trained
    ]
    return Plan(
        device=device.device_kind,
        devices=layout.mesh.size,
        mesh=mesh,
        parameters=_bytes(state.params),
        state=_bytes((state.opt_state, state.extra)),
        gradients=_bytes(trained),
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        carried=carried(text),
        aliased=analysis.alias_size_in_bytes,
        flops=program.flops_per_step,
        operations=operations(traced),
        moved=found.bytes,
        collectives=found.collectives,
        asked=expected(program),
        across=found.across,
        loops=found.loops,
        tokens=program.phase.tokens_per_step,
        steps=program.phase.total_steps,
        seconds=seconds,
    )


class DoesNotFit(ConfigError):
    """The compiler refuses a program whose memory the chip does not have."""

    def __init__(self, said: str):
        super().__init__("topology", f"does not fit: {said}")


def _said(message: str) -> str:
    """What of the compiler's words says how much is wanted and how much there is."""
    found = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+", message)
    return found[0] if found else message.split("\n")[0]


def program_on(run: Run, topology: str, vocabulary: Any, phase: int = 0) -> Program:
    """A phase of a run on the mesh that its config makes of a topology's devices.

    Args:
      vocabulary: the ``Vocabulary`` of its tokenizer.

    Raises:
      ConfigError: a topology that is not known, or that nothing here can compile for.
    """
    return Program(run, phase, vocabulary, run.mesh.build(devices_of(topology)))


def devices_of(topology: str) -> list[Any]:
    """The devices of a described topology, of which there need be none here.

    Raises:
      ConfigError: a topology that is not known, or that nothing here can compile for.
    """
    chip, _, shape = topology.partition(":")
    known = ", ".join([*HOST, *GPUS])
    if chip not in HOST and chip not in GPUS:
        raise ConfigError("topology", f"{topology!r}: no chip {chip!r}; known: {known}")
    sizes = shape.split("x")
    if not all(size.isdigit() and int(size) for size in sizes):
        raise ConfigError(
            "topology", f"{topology!r} is not CHIP:NUMBER or CHIP:AxBxC, as v5e:1 or v5p:2x2x1"
        )
    count = math.prod(int(size) for size in sizes)
    if chip in GPUS:
        return _gpus(chip, count)
    return _tpus(topology, chip, shape if len(sizes) > 1 else None, count)


def _gpus(chip: str, count: int) -> list[Any]:
    if not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)):
        raise ConfigError(
            "topology", f'{chip}: JAX\'s CUDA plugin is missing: pip install "jax[cuda12]"'
        )
    # The plugin would not load where there is no driver to ask for its version.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=chip,
        target_config=GPUS[chip],
        topology=f"1x{-(-count // GPUS_OF_HOST)}x{min(count, GPUS_OF_HOST)}",
    )
    return list(described.devices)


def _tpus(topology: str, chip: str, shape: str | None, count: int) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("topology", f'{topology}: libtpu is missing: pip install "jax[tpu]"')
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip}:{shape or HOST[chip]}"
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError("topology", f"{topology}: libtpu says: {error}") from None
    devices = list(described.devices)
    if count > len(devices):
        raise ConfigError(
            "topology",
            f"{topology}: by number no more than the {len(devices)} of {chip}:{HOST[chip]}; "
            "name the shape",
        )
    return devices[:count]


def _bytes(tree: Any) -> int:
    """Of the part of these arrays that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
