"""What chips can do at best: the figures that a run's speed is held against.

``flops`` is the dense peak of matrix products in bfloat16 with float32 accumulation (float16 on
chips without bfloat16): the usual base of "model FLOPs utilisation". Vendors' figures "with
sparsity" are halved here. All are of one *device* as JAX counts them, which on TPU v2, v3 and 7x
is one core, half a chip; the makers' pages give whole chips.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

Device = Any  # a jax.Device, whose name pyright takes for a variable

TPU_PAGES = "https://docs.cloud.google.com/tpu/docs/"  # + v4, v5e, v5p, v6e, tpu7x


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts devices.

    kinds: what ``jax.Device.device_kind`` says.
    flops: FLOP/s, dense, bfloat16 (float16 where there is none).
    memory: bytes of HBM (or GDDR) on the data sheet; a program gets a little less.
    bandwidth: bytes/s between that memory and the cores.
    source: where the figures come from.
    interconnect: bytes/s that it can send to other devices near it (a TPU slice, the GPUs of a
      host), over all its links, in one direction; None where it has none of its own.
    network: bytes/s that it can send to those of other hosts, where that is something else: one
      adapter of 400 Gbit/s a GPU, as DGX H100, H200 and B200 have.
    """

    kinds: tuple[str, ...]
    name: str
    flops: float
    memory: float
    bandwidth: float
    source: str
    interconnect: float | None = None
    network: float | None = None


def _nvidia(page: str) -> str:
    return f"https://www.nvidia.com/en-us/{page}"


_AMPERE = "https://images.nvidia.com/aem-dam/en-zz/Solutions/geforce/ampere/pdf/NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf"
_A100 = _nvidia("data-center/a100/")
_H100 = _nvidia("data-center/h100/")

CHIPS = (
    Chip(("TPU v2",), "TPU v2 core", 22.5e12, 8 * 2**30, 350e9, TPU_PAGES + "v2"),
    Chip(("TPU v3",), "TPU v3 core", 61.5e12, 16 * 2**30, 450e9, TPU_PAGES + "v3"),
    Chip(("TPU v4",), "TPU v4", 275e12, 32 * 2**30, 1228e9, TPU_PAGES + "v4", 300e9),
    Chip(
        ("TPU v5 lite", "TPU v5e"), "TPU v5e", 197e12, 16 * 2**30, 819e9, TPU_PAGES + "v5e", 200e9
    ),
    Chip(("TPU v5", "TPU v5p"), "TPU v5p", 459e12, 95 * 2**30, 2765e9, TPU_PAGES + "v5p", 600e9),
    Chip(
        ("TPU v6 lite", "TPU v6e"), "TPU v6e", 918e12, 32 * 2**30, 1638e9, TPU_PAGES + "v6e", 400e9
    ),
    Chip(("TPU7x",), "TPU 7x core", 1153.5e12, 96 * 2**30, 3690e9, TPU_PAGES + "tpu7x"),
    Chip(("Tesla T4",), "T4 (float16)", 65e12, 16e9, 320e9, _nvidia("data-center/tesla-t4/")),
    Chip(
        ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
        "V100 SXM2 (float16)",
        125e12,
        16e9,
        900e9,
        _nvidia("data-center/v100/"),
    ),
    Chip(("NVIDIA A100-SXM4-40GB",), "A100 40 GB", 312e12, 40e9, 1555e9, _A100, 300e9),
    Chip(("NVIDIA A100-PCIE-40GB",), "A100 PCIe 40 GB", 312e12, 40e9, 1555e9, _A100),
    Chip(("NVIDIA A100-SXM4-80GB",), "A100 80 GB", 312e12, 80e9, 2039e9, _A100, 300e9),
    Chip(("NVIDIA A100 80GB PCIe",), "A100 PCIe 80 GB", 312e12, 80e9, 1935e9, _A100),
    Chip(
        ("NVIDIA A10G",),
        "A10G",
        70e12,
        24e9,
        600e9,
        "https://aws.amazon.com/ec2/instance-types/g5/",
    ),
    Chip(("NVIDIA L4",), "L4", 121e12, 24e9, 300e9, _nvidia("data-center/l4/")),
    Chip(("NVIDIA L40S",), "L40S", 362e12, 48e9, 864e9, _nvidia("data-center/l40s/")),
    Chip(("NVIDIA GeForce RTX 3090",), "RTX 3090", 71e12, 24e9, 936e9, _AMPERE),
    Chip(
        ("NVIDIA GeForce RTX 4090",),
        "RTX 4090",
        165.2e12,
        24e9,
        1008e9,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    Chip(("NVIDIA H100 80GB HBM3",), "H100 SXM", 989.4e12, 80e9, 3350e9, _H100, 450e9, 50e9),
    Chip(("NVIDIA H100 PCIe",), "H100 PCIe", 756e12, 80e9, 2000e9, _H100),
    Chip(("NVIDIA H100 NVL",), "H100 NVL", 835e12, 94e9, 3900e9, _H100),
    Chip(
        ("NVIDIA GH200 480GB",),
        "GH200",
        989.4e12,
        96e9,
        4000e9,
        _nvidia("data-center/grace-hopper-superchip/"),
    ),
    Chip(
        ("NVIDIA H200",), "H200", 989.4e12, 141e9, 4800e9, _nvidia("data-center/h200/"), 450e9, 50e9
    ),
    Chip(
        ("NVIDIA B200",), "B200", 2250e12, 180e9, 8000e9, _nvidia("data-center/hgx/"), 900e9, 50e9
    ),
    Chip(("NVIDIA GB200",), "GB200", 2500e12, 186e9, 8000e9, _nvidia("data-center/gb200-nvl72/")),
)


def chip(device_kind: str) -> Chip | None:
    """The chip of a device kind, or None where it is not in the table (CPUs are not)."""
    for candidate in CHIPS:
        if device_kind in candidate.kinds:
            return candidate
    return None


def peak_flops(device: Device | None = None, *, measure: bool = False) -> float | None:
    """FLOP/s of one device at best.

    Args:
      device: default, the first.
      measure: where the table has no figure, time matrix products instead (about half a second,
        once a process); without it the answer is then None.
    """
    one: Any = jax.devices()[0] if device is None else device
    known = chip(one.device_kind)
    if known is not None:
        return known.flops
    return measured_flops(one) if measure else None


@functools.cache
def measured_flops(device: Device, size: int = 1024, seconds: float = 0.4) -> float:
    """FLOP/s of float32 matrix products on a device (bfloat16 on accelerators), the best seen.

    On a CPU the virtual devices of one process share its cores: the figure is of the process when
    nothing else runs, so compare it with all the devices together.
    """
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda a, b: a @ b).lower(x, x).compile()
    product(x, x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def total_peak(devices: list[Device] | None = None, *, measure: bool = False) -> float | None:
    """FLOP/s of all devices together at best; see ``peak_flops``."""
    devices = devices or jax.devices()
    one = peak_flops(devices[0], measure=measure)
    if one is None:
        return None
    processes = len({d.process_index for d in devices})
    return one * (processes if devices[0].platform == "cpu" else len(devices))
