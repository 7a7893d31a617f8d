"""What the GPU kernels have to do: ``python -m kernels.attention.gpu_cost --chip h100``.

No compiler is asked: the blocks that each kernel visits are counted from its own tables, and from
them its products, its exponentials and what it moves. Of each the least time it can take on the
chip; the kernel takes at least the longest of them. Biases and masks are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels.attention import cases, gpu, gpu_backward, gpu_parts
from kernels.attention.bias import RelativeBias
from kernels.attention.cases import Case
from kernels.attention.gpu_parts import Plan


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: dense bfloat16. bandwidth: bytes/s of memory. cores: multiprocessors, each of which
    makes ``EXPONENTIALS`` in a cycle (CUDA programming guide, throughput of arithmetic
    instructions, 8.0 to 9.0), at ``ghz``: the clock of which ``flops`` is the peak."""

    flops: float
    bandwidth: float
    cores: int
    ghz: float


EXPONENTIALS = 16
CHIPS = {  # as in jaxpt/hardware.py, from the data sheets
    "h100": Chip(989.4e12, 3350e9, 132, 1.83),
    "a100": Chip(312e12, 2039e9, 108, 1.41),
    "l4": Chip(121e12, 300e9, 58, 2.04),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """One kernel's work: pairs of blocks (of all rows and heads), floating-point operations of its
    products, exponentials, bytes that its arrays hold, and bytes that its programs read."""

    name: str
    blocks: int
    flops: float
    exponentials: float
    bytes: float
    loads: float

    def seconds(self, chip: Chip) -> dict[str, float]:
        """The least time for each."""
        return {
            "products": self.flops / chip.flops,
            "exponentials": self.exponentials / (EXPONENTIALS * chip.cores * chip.ghz * 1e9),
            "memory": self.bytes / chip.bandwidth,
        }


def costs(case: Case) -> list[Cost]:
    """Of each kernel that the case runs."""
    bias = case.bias_of(jnp.zeros((case.heads, cases.BUCKETS)))
    rule = {
        "causal": case.causal,
        "window": case.window,
        "segments": case.documents > 1,
        "prefix": False,
        "positions": False,
    }
    dtype = jnp.dtype(case.dtype)
    plans = gpu.plans_for(case.length, case.length, case.width, dtype, bias, None, rule, scale=1.0)
    size, width = dtype.itemsize, gpu.power_of_two(case.width)
    row = case.batch * case.length * width * size
    queries, keys = row * case.heads, row * case.groups
    numbers = case.batch * case.heads * case.length * 4  # one a query, in float32

    def cost(name: str, plan: Plan, blocks: int, products: int, arrays: float, loads: float):
        """loads: bytes that each block reads, times ``width * size``."""
        pairs = blocks * plan.size.queries * plan.size.keys
        flops = 2.0 * products * pairs * width
        return Cost(name, blocks, flops, pairs, arrays, blocks * loads * width * size)

    f, q, k = plans.of_forward, plans.of_queries, plans.of_keys
    found = [
        cost("forward", f, _visited(f, case), 2, 2 * queries + 2 * keys + numbers, 2 * f.size.keys)
    ]
    if not case.backward:
        return found
    arrays = 2 * queries + 2 * keys + 2 * numbers
    found += [
        cost("keys", k, _visited(k, case), 4, arrays + 2 * keys, 2 * k.size.queries),
        cost("queries", q, _visited(q, case), 3, arrays + queries, 2 * q.size.keys),
    ]
    if isinstance(bias, RelativeBias):
        b = plans.of_bias
        _, tiles = gpu_backward.diagonals(b)
        blocks = tiles * b.rule.query_blocks * case.batch * case.heads
        found.append(cost("bias", b, blocks, 2, arrays, 4 * b.size.queries))
    return found


def _visited(plan: Plan, case: Case) -> int:
    """Pairs of blocks, of all rows and heads."""
    marks = {}
    if case.documents > 1:
        row = 1 + np.arange(case.length) * case.documents // case.length
        for name, to in (
            ("segments", plan.rule.padded_queries), ("kv_segments", plan.rule.padded_keys)
        ):  # fmt: skip
            marks[name] = np.pad(row, (0, to - case.length))[None]
    _, counts = gpu_parts.tables(plan, marks)
    return int(counts[..., 2].sum()) * case.batch * case.heads


def report(case: Case, chip: Chip) -> str:
    """A table, a row a kernel."""
    lines = [
        f"{'kernel':8} {'blocks':>9} {'GFLOP':>9} {'products':>9} {'exp':>9} {'memory':>9} "
        f"{'floor':>9} {'MB moved':>9} {'MB read':>9}"
    ]
    found = costs(case)
    for cost in found:
        times = cost.seconds(chip)
        cells = [1e3 * t for t in (*times.values(), max(times.values()))]
        lines.append(
            f"{cost.name:8} {cost.blocks:9} {cost.flops / 1e9:9.1f} "
            + " ".join(f"{ms:6.3f} ms" for ms in cells)
            + f" {cost.bytes / 1e6:9.1f} {cost.loads / 1e6:9.1f}"
        )
    floor = sum(max(cost.seconds(chip).values()) for cost in found)
    least = case.flops() / chip.flops
    lines.append(f"all: {1e3 * floor:.3f} ms; the products that the rule leaves: {1e3 * least:.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", choices=tuple(CHIPS), default="h100")
    parser.add_argument("--length", type=int, default=Case().length)
    parser.add_argument("--backward", action="store_true", help="with all gradients")
    cases.add_arguments(parser, Case())
    args = parser.parse_args()
    print(report(cases.case_of(args), CHIPS[args.chip]))


if __name__ == "__main__":
    main()
