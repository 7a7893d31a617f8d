"""What a kernel costs on a TPU that is not there: ``python -m kernels.inspect OP --target v5e``.

The program is compiled ahead of time for the chip by libtpu (extra ``tpu``), in a process of its
own that writes down the machine code; its cycles are counted from that (``tpu_schedule``). Waiting
for memory is not in the count: the time that its transfers take stands beside it.

An operation is a folder ``kernels/OP``; its ``inspect.py`` holds

    add_arguments(parser: argparse.ArgumentParser) -> None          # its own options
    subjects(args: argparse.Namespace) -> list[Subject]             # what is compiled
    tune(args: argparse.Namespace, count: Count) -> str             # optional: for --tune
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kernels import benchmark, tpu_program
from kernels.platform import compiling_for
from kernels.tpu_program import Operation
from kernels.tpu_schedule import is_matmul

FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true "
    "--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra|deduplication-map"
)
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip as libtpu names it. The figures are of one core; those of v5p, of which JAX shows two
    as one device, are half of the chip's, and its kernels run on both.

    ghz: of the core, from the peak of its matrix units. rows: of a matrix (in bfloat16) that one
    of its ``mxus`` takes in a cycle. flops: dense bfloat16. bandwidth: bytes/s of HBM.
    """

    topology: str
    ghz: float
    mxus: int
    rows: int
    flops: float
    bandwidth: float
    cores: int = 1


CHIPS = {  # https://docs.cloud.google.com/tpu/docs/ + v5e, v5p, v6e
    "v5e": Chip("v5e:2x2", 1.5, 4, 1, 197e12, 819e9),
    "v5p": Chip("v5p:2x2x1", 1.75, 4, 1, 459e12 / 2, 2765e9 / 2, cores=2),
    "v6e": Chip("v6e:2x2", 1.75, 2, 2, 918e12, 1638e9),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A program to compile.

    arguments: those of ``function``, made by ``make(shape, dtype)``. flops, bytes: the least that
    it has to do and to move.
    """

    name: str
    function: Callable[..., Any]
    arguments: Callable[[Callable[..., Any]], tuple[Any, ...]]
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Counted:
    """One program: its operations, and bytes of temporaries; or why it does not compile."""

    operations: list[Operation]
    temporary: int
    error: str | None = None

    @property
    def cycles(self) -> int:
        return sum(operation.cycles for operation in self.operations)


Count = Callable[[Sequence[str]], list[Counted]]  # options of the operation -> its subjects'


def compile_into(folder: Path, subjects: Sequence[Subject], chip: Chip) -> None:
    """Compiles each subject for the chip and moves what libtpu wrote of it to ``folder/0``, ...
    Runs in the process whose libtpu was told to write to ``folder``."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    sharding = SingleDeviceSharding(topology.devices[0])

    def make(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    for n, subject in enumerate(subjects):
        into = folder / str(n)
        into.mkdir()
        try:
            with compiling_for(topology.devices[0]):
                traced = jax.jit(subject.function).trace(*subject.arguments(make))
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
            memory: Any = compiled.memory_analysis()
            result = {"temporary": memory.temp_size_in_bytes}
        except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
            result = {"temporary": 0, "error": f"{type(error).__name__}: {error}"}
        for path in folder.glob("*.*"):
            shutil.move(path, into / path.name)
        (into / "result.json").write_text(json.dumps(result))


def count(operation: str, options: Sequence[str]) -> list[Counted]:
    """The subjects that these options make, compiled in another process, and counted.

    Raises:
      RuntimeError: there is no libtpu, or that process failed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            "libtpu is not installed, which compiles for TPUs: pip install 'jaxpt[tpu]'"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": FLAGS.format(folder=folder),
        }
        command = [sys.executable, "-m", "kernels.inspect", operation, *options]
        done = subprocess.run(
            [*command, "--compile-into", name], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"the compiling process failed:\n{done.stderr[-3000:]}")
        numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        return [_counted(folder / str(n)) for n in numbers]


def _counted(folder: Path) -> Counted:
    result = json.loads((folder / "result.json").read_text())
    error = result.get("error")
    return Counted([] if error else tpu_program.read(folder), result["temporary"], error)


def rows(subject: Subject, counted: Counted, chip: Chip, least: float = 0.01) -> list[dict]:
    """A row for each operation with a share of at least ``least`` of the cycles, and the sum.

    "loop": bundles of the stretch in which most of the cycles go, and how often it runs. "MXU":
    share of the cycles in which the matrix units work. "spills": stores and loads of vector
    registers, in thousands. "MB" and "ms to move": bytes between HBM and the core, and the time
    that takes, which is not in "ms". Of the sum they are the least that has to be moved; "ms to
    compute" is the least that the products take.
    """
    columns = ("by", "operation", "times", "Mcycles", "ms", "loop", "trips", "MXU", "MXU of loop",
               "spills", "MB", "ms to move", "ms to compute", "note")  # fmt: skip
    empty = dict.fromkeys(columns)
    if counted.error:
        return [empty | {"by": subject.name, "note": counted.error.split("\n")[0][:80]}]
    found = []
    for operation in counted.operations:
        if operation.cycles < least * counted.cycles:
            continue
        schedule, loop = operation.schedule, operation.schedule.hottest
        moved = operation.times * schedule.moved()
        busy = operation.times * mxu_cycles(schedule.issued, chip)
        in_loop = mxu_cycles(lambda matches, loop=loop: sum(map(matches, loop.ops)), chip)
        found.append(
            empty
            | {
                "by": subject.name,
                "operation": operation.name,
                "times": operation.times,
                "Mcycles": operation.cycles / 1e6,
                "ms": operation.cycles / chip.ghz / 1e6,
                "loop": loop.bundles,
                "trips": operation.times * loop.count,
                "MXU": busy / operation.cycles,
                "MXU of loop": in_loop / loop.bundles,
                "spills": operation.times * schedule.spills() / 1e3,
                "MB": moved / 1e6,
                "ms to move": 1e3 * moved / chip.bandwidth,
                "note": f"{schedule.unknown} unknown branches" if schedule.unknown else None,
            }
        )
    total = empty | {
        "by": subject.name,
        "operation": "all",
        "Mcycles": counted.cycles / 1e6,
        "ms": counted.cycles / chip.ghz / 1e6,
        "MB": subject.bytes / chip.cores / 1e6,
        "ms to move": 1e3 * subject.bytes / chip.cores / chip.bandwidth,
        "ms to compute": 1e3 * subject.flops / chip.cores / chip.flops,
        "note": f"{counted.temporary / MIB:,.0f} MiB of temporaries",
    }
    return [*found, total]


def mxu_cycles(issued: Callable[..., int], chip: Chip) -> float:
    """Cycles in which all the matrix units work: a product takes 16 rows of bfloat16, or 8."""
    wide = issued(lambda op: is_matmul(op) and ".bf16" in op.name and ".lmr" not in op.name)
    products = issued(is_matmul)
    return (16 * wide + 8 * (products - wide)) / chip.rows / chip.mxus


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=tuple(CHIPS), default="v5e")
    parser.add_argument("--tune", action="store_true", help="find the best block sizes instead")
    parser.add_argument("--compile-into", type=Path, help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = benchmark.parser_of(
        "inspect", "The static cost of an operation's TPU kernels.", _add_arguments
    )
    args = parser.parse_args(argv)
    chip, name = CHIPS[args.target], args.operation
    if args.compile_into:
        compile_into(args.compile_into, args.own.subjects(args), chip)
        return
    if args.tune:
        if not hasattr(args.own, "tune"):
            parser.error(f"there is nothing to tune in {name}")
        print(args.own.tune(args, lambda options: count(name, options)))
        return
    counts = count(name, argv[1:])
    subjects = args.own.subjects(args)
    table = [row for pair in zip(subjects, counts, strict=True) for row in rows(*pair, chip)]
    record = {"chip": f"static, for {args.target}", **benchmark.stamp(argv, "kernels.inspect")}
    if args.json:
        print(json.dumps(record | {"rows": table}))
    else:
        print(benchmark.heading(record))
        print(benchmark.table(table))


if __name__ == "__main__":
    main()
