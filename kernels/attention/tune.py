"""Which block sizes take the fewest cycles, for each chip, width of heads, bias and length.

One program, of two blocks of queries and keys, tells for its sizes what a pair of blocks of each
kind costs: its code is gone through with tables of such pairs. What a length costs is the sum over
the pairs that the causal rule leaves there. A pair costs at least what its keys and values take to
come in.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from kernels import benchmark
from kernels.attention import blocks
from kernels.attention.blocks import DIAGONAL, FIRST, FULL, KIND, LAST
from kernels.attention.tuning import Sizes
from kernels.inspect import CHIPS, Chip, Count, Counted
from kernels.tpu_schedule import Schedule

WIDTHS, LENGTHS = (64, 128, 256), (512, 1024, 2048, 4096, 8192)
BLOCKS, CHUNKS = (512, 1024), (128, 256, 512)
NOTHING = 3  # a kind that no kernel of the two knows, where none is partial
PAIRS = 3  # of the program that is compiled: two of the diagonal, one below


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cycles of a kernel: of a pair of blocks by its kind, of a row of pairs, and of a head."""

    full: float
    diagonal: float
    row: float
    head: float

    def of(self, length: int, block: int) -> float:
        """Of a head of ``length`` in causal order."""
        rule = blocks.Rule(length, length, block, block, causal=True)
        words = np.asarray(blocks.table(rule))[0]
        kinds = (words >> KIND) & 3
        pairs = self.full * (kinds == FULL).sum() + self.diagonal * (kinds == DIAGONAL).sum()
        return float(self.head + self.row * rule.query_blocks + pairs)


def cost(schedule: Schedule, least: float) -> Cost:
    """From a kernel's code. ``least``: cycles that a pair takes to come in."""

    def cycles(kinds: Sequence[int], ends: int = 0) -> int:
        words = [kind << KIND | ends for kind in kinds]
        return schedule.again({0: words}).cycles

    nothing = cycles([NOTHING] * PAIRS)
    idle = schedule.again({0: [NOTHING << KIND] * PAIRS})
    step = sum(block.bundles for block in idle.blocks if block.count >= PAIRS)
    full, diagonal = (
        max(step + cycles([NOTHING, kind, NOTHING]) - nothing, least) for kind in (FULL, DIAGONAL)
    )
    row = (cycles([NOTHING] * PAIRS, 1 << FIRST | 1 << LAST) - nothing) / PAIRS
    return Cost(full, diagonal, row, nothing - step * PAIRS)


def winners(
    found: Iterable[tuple[int, int, Counted]], width: int, chip: Chip
) -> dict[int, tuple[int, ...]]:
    """Length -> (forward, backward, forward_chunk, backward_chunk) with the fewest cycles, of
    (block, chunk, program)."""
    costs: dict[str, dict[tuple[int, int], Cost]] = {"forward": {}, "backward": {}}
    for block, chunk, counted in found:
        if counted.error:
            continue
        least = 2 * block * max(width, 128) * 2 / chip.bandwidth * chip.ghz * 1e9
        for direction, by_sizes in costs.items():
            name = f"attention_{direction}"
            kernel = next(o for o in counted.operations if name in o.name)
            by_sizes[block, chunk] = cost(kernel.schedule, least)
    best = {}
    for length in LENGTHS:
        (f, fc), (b, bc) = (
            min(
                by_sizes, key=lambda x, by_sizes=by_sizes: by_sizes[x].of(length, min(x[0], length))
            )
            for by_sizes in costs.values()
        )
        best[length] = (f, b, fc, bc)
    return best


def tune(args: argparse.Namespace, count: Count) -> str:
    """The text of ``tuned.py``, with the chip of ``--target`` measured anew."""
    from kernels.attention import tuned

    chip = CHIPS[args.target]
    rows = {}
    for width, bias in itertools.product(args.tune_widths, (None, "t5")):
        found = []
        for block, chunk in itertools.product(args.tune_blocks, args.tune_chunks):
            sizes = [str(n) for n in dataclasses.astuple(Sizes(block, block, chunk, chunk))]
            options = ["--batch", "1", "--heads", "1", "--width", str(width), "--backward"]
            options += ["--length", str(2 * block), "--target", args.target, "--blocks", *sizes]
            found += [(block, chunk, *count([*options, *(["--bias", bias] if bias else [])]))]
        rows[width, bias is not None] = winners(found, width, chip)
    packages = benchmark.versions()
    made = (
        f"blocks of {_listed(args.tune_blocks)}, chunks of {_listed(args.tune_chunks)}",
        f"libtpu {packages['libtpu']}, jax {packages['jax']}, {benchmark.today()}",
    )
    return text({**tuned.SIZES, args.target: rows}, {**tuned.MADE, args.target: made})


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _entry(chip: str, how: Sequence[str]) -> list[str]:
    """As the formatter would have it."""
    return [f'    "{chip}": (', *(f'        "{part}",' for part in how), "    ),"]


def text(sizes: dict, made: dict) -> str:
    """Of the file that holds them."""
    lines = [
        '"""Block sizes of the TPU kernels that took the fewest cycles, by the compiler.',
        "",
        "Made, chip by chip, by",
        "",
        "    python -m kernels.inspect attention --tune --target v5e > tuned.py",
        "",
        "(``tune.py`` says how): causal, bfloat16, at the lengths below. No chip was there.",
        '"""',
        "",
        "MADE = {",
        *(line for chip, how in made.items() for line in _entry(chip, how)),
        "}",
        "",
        "# chip -> (width of heads, whether there is a relative bias) -> length ->",
        "# most of a block forward and backward, queries of a chunk within it forward and backward",
        "SIZES = {",
    ]
    for chip, rows in sizes.items():
        lines += [f'    "{chip}": {{']
        for key, best in rows.items():
            lines += [f"        {key}: {{", *(f"            {n}: {x}," for n, x in best.items())]
            lines += ["        },"]
        lines += ["    },"]
    return "\n".join([*lines, "}"])
