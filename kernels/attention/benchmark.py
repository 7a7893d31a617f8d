"""Attention's implementations against plain XLA, cuDNN and the kernels that JAX ships."""

from __future__ import annotations

import argparse
import functools
import gc
from typing import Any

import jax

from kernels import timing
from kernels.attention import api, cases
from kernels.attention.cases import Case
from kernels.attention.peers import PEERS

LARGE, SMALL = Case(), Case(batch=1, heads=2, width=64)
COLUMNS = ("length", "direction", "by", "ms", "TFLOP/s", "of matmul", "temporary MiB", "note")
# The backend that an implementation of ours needs; those that are not here run anywhere.
NEEDS = {
    "pallas_tpu": ("tpu",),
    "cudnn": ("gpu",),
    "pallas_gpu": ("gpu",),
    "reference": (),
    "pallas_tpu_interpret": (),
    "pallas_gpu_interpret": (),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_cpu = jax.default_backend() == "cpu"
    lengths = (256, 512) if on_cpu else (1024, 4096, 16384)
    cases.add_arguments(parser, SMALL if on_cpu else LARGE)
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="names of implementations; default: all")
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True)


def implementations() -> dict[str, cases.Implementation]:
    """Those of ours and of others that the default backend can run."""
    backend = jax.default_backend()
    names = [name for name in api.IMPLEMENTATIONS if backend in NEEDS.get(name, (backend,))]
    return PEERS[backend] | {f"ours: {name}": cases.ours(name) for name in names}


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each length, direction and implementation.

    Times are medians in ms; TFLOP/s count the pairs that the rule leaves; "of matmul" is their
    share of the rate that a large matrix product of the same dtype reached here just before;
    "temporary MiB" is what the compiled program takes beside arguments and results.
    """
    rate = timing.matmul_rate(args.dtype, rounds=args.rounds)
    found: list[dict[str, Any]] = [
        dict.fromkeys(COLUMNS)
        | {"by": "a matrix product", "TFLOP/s": rate / 1e12, "of matmul": 1.0}
    ]
    for length in args.lengths:
        for backward in (False, True) if args.backward else (False,):
            case = cases.case_of(args, length=length, backward=backward)
            found += _rows(case, args, rate)
    return found


def _rows(case: Case, args: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    arguments = case.arguments(cases.random_argument())
    lines, functions = {}, {}
    for name, implementation in implementations().items():
        if args.only and name not in args.only:
            continue
        direction = "forward + backward" if case.backward else "forward"
        lines[name] = dict.fromkeys(COLUMNS) | {
            "length": case.length, "direction": direction, "by": name
        }  # fmt: skip
        try:
            compiled = jax.jit(case.function(implementation)).lower(*arguments).compile()
            jax.block_until_ready(compiled(*arguments))
        except NotImplementedError as error:
            lines[name]["note"] = f"does not serve {error}"
            continue
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            lines[name]["note"] = "out of memory"
            continue
        memory: Any = compiled.memory_analysis()
        lines[name]["temporary MiB"] = memory.temp_size_in_bytes / 2**20
        functions[name] = functools.partial(compiled, *arguments)
    if functions:
        times = timing.interleaved(functions, rounds=args.rounds)
        for name, time in times.items():
            done = case.flops() / time.seconds
            lines[name] |= {
                "ms": 1e3 * time.seconds, "TFLOP/s": done / 1e12, "of matmul": done / rate
            }  # fmt: skip
    functions.clear()
    gc.collect()  # the programs, before those of the next length
    return list(lines.values())
