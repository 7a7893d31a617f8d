"""Attention's TPU kernels, and others', as the compiler schedules them."""

from __future__ import annotations

import argparse
import functools

from kernels.attention import cases, tpu, tuning
from kernels.attention.cases import Case
from kernels.attention.peers import PEERS
from kernels.attention.tune import BLOCKS, CHUNKS, WIDTHS, tune
from kernels.inspect import Subject

__all__ = ["add_arguments", "subjects", "tune"]
OURS = "pallas_tpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases.add_arguments(parser, Case())
    parser.add_argument("--length", type=int, default=Case().length)
    parser.add_argument("--backward", action="store_true", help="with all gradients")
    parser.add_argument(
        "--blocks", type=int, nargs=4, metavar=("F", "B", "FC", "BC"),
        help="of ours: most queries and keys of a block, forward and backward, and queries of a "
        "chunk within it; default: by the table of what won",
    )  # fmt: skip
    parser.add_argument(
        "--by", nargs="+", default=[OURS], choices=(OURS, "xla", *PEERS["tpu"]),
        help="whose implementations",
    )  # fmt: skip
    for name, tried in (("widths", WIDTHS), ("blocks", BLOCKS), ("chunks", CHUNKS)):
        parser.add_argument(
            f"--tune-{name}", type=int, nargs="+", default=tried, help=f"{name} to try with --tune"
        )


def subjects(args: argparse.Namespace) -> list[Subject]:
    case = cases.case_of(args)
    found = []
    for name in args.by:
        implementation = PEERS["tpu"].get(name) or cases.ours(name)
        if name == OURS and args.blocks:
            implementation = functools.partial(with_sizes, tuning.Sizes(*args.blocks))
        function = case.function(implementation)
        found.append(Subject(name, function, case.arguments, case.flops(), case.bytes()))
    return found


def with_sizes(sizes: tuning.Sizes, q, k, v, bias, case: Case):
    """Ours with these block sizes."""
    segments = case.segments()
    return tpu.attention(
        q, k, v, causal=case.causal, window=case.window, segments=segments, kv_segments=segments,
        bias=bias, scale=case.width**-0.5, sizes=sizes,
    )  # fmt: skip
