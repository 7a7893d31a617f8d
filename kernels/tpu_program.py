"""What a compiled TPU program runs: which operations, how often, with which tables.

From the scheduled HLO that libtpu writes beside the listings of ``tpu_schedule``.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kernels import tpu_schedule
from kernels.tpu_schedule import Schedule

LANES = 128
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NAME = re.compile(r"%([\w.\-]+)")
# What passes its operand on unchanged.
_SAME = ("copy", "copy-start", "copy-done", "bitcast", "reshape", "get-tuple-element")
_CALLS = ("while", "conditional", "call", "async-start")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    text: str  # from the operands on

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.text.split("), ")[0])


@dataclasses.dataclass(frozen=True)
class Operation:
    """One that has machine code of its own, run ``times`` times."""

    name: str
    opcode: str
    times: int
    schedule: Schedule

    @property
    def cycles(self) -> int:
        return self.times * self.schedule.cycles


def instructions(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(instructions of each computation, the name of the first), from HLO's text."""
    found: dict[str, list[Instruction]] = {}
    entry = here = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            here = match[2]
            entry = here if match[1] else entry
            found[here] = []
        elif here and (match := _INSTRUCTION.match(line)):
            found[here].append(Instruction(match[1], match[2], match[3], match[4]))
    return found, entry


def times(computations: Mapping[str, list[Instruction]], entry: str) -> collections.Counter[str]:
    """How often each instruction runs. Of a conditional every branch counts."""
    counts: collections.Counter[str] = collections.Counter()

    def visit(name: str, n: int) -> None:
        for instruction in computations.get(name, ()):
            if instruction.opcode not in _CALLS:
                counts[instruction.name] += n
                continue
            each = n * (trips(computations, instruction) if instruction.opcode == "while" else 1)
            called = _CALLED.findall(instruction.text)
            for branches in _BRANCHES.findall(instruction.text):
                called += _NAME.findall(branches)
            for name_of_called in called:
                visit(name_of_called, each)

    visit(entry, 1)
    return counts


def trips(computations: Mapping[str, list[Instruction]], loop: Instruction) -> int:
    """How often a loop's body runs. JAX's, and XLA's own around collectives, count from zero while
    they are below a constant: by ones, unless the body says otherwise.

    Raises:
      ValueError: the text does not say.
    """
    said = _TRIPS.search(loop.text)
    if said:
        return int(said[1])
    parts = dict(re.findall(r"(condition|body)=%([\w.\-]+)", loop.text))
    condition, body = (computations.get(parts.get(n, ""), []) for n in ("condition", "body"))
    bounds = [_integer(i) for i in condition if i.opcode == "constant"]
    below = any(i.opcode == "compare" and "direction=LT" in i.text for i in condition)
    if len(bounds) != 1 or bounds[0] is None or not below:
        raise ValueError(f"how often does {loop.name} run?")
    return -(-bounds[0] // _step(condition, body))


def _integer(instruction: Instruction) -> int | None:
    found = re.match(r"(\d+)\)", instruction.text) if instruction.opcode == "constant" else None
    return int(found[1]) if found else None


def _step(condition: list[Instruction], body: list[Instruction]) -> int:
    """What the body adds to the number that the condition reads; 1 where that is not plain."""
    read = [i for i in condition if i.opcode == "get-tuple-element"]
    index = re.search(r"index=(\d+)", read[0].text) if len(read) == 1 else None
    if index is None or not body or len(body[-1].operands) <= int(index[1]):
        return 1
    known = {i.name: i for i in body}
    grown = known.get(body[-1].operands[int(index[1])])
    if grown is None or grown.opcode != "add":
        return 1
    steps = (_integer(known[name]) for name in grown.operands if name in known)
    return next((step for step in steps if step), 1)


def table_of(known: Mapping[str, Instruction], name: str) -> list[int]:
    """Words of a constant of integers that reaches a call by way of copies, as they lie in memory:
    rows are filled up to 128 words, and 4 rows of 8 bits (or 2 of 16) share them. Empty where it
    is none, or not spelled out."""
    while name in known and known[name].opcode in _SAME and known[name].operands:
        name = known[name].operands[0]
    if name not in known or known[name].opcode != "constant":
        return []
    shape = re.match(r"[su](8|16|32)\[([\d,]*)\]", known[name].shape)
    literal = re.match(r"([\d\s{},\-]*)\)", known[name].text)
    if shape is None or literal is None:
        return []
    bits, sizes = int(shape[1]), [1, 1, *(int(n) for n in shape[2].split(",") if n)]
    values = np.array([int(x) for x in re.findall(r"-?\d+", literal[1])], np.int64)
    values = (values & ((1 << bits) - 1)).reshape(-1, *sizes[-2:])
    rows = 32 // bits
    values = np.pad(values, ((0, 0), (0, -sizes[-2] % rows), (0, -sizes[-1] % LANES)))
    values = values.reshape(len(values), -1, rows, values.shape[-1])
    words = (values << (np.arange(rows)[:, None] * bits)).sum(2)
    return words.reshape(-1).tolist()


def read(folder: Path) -> list[Operation]:
    """The operations of the one program whose dump lies in ``folder``, in the order of their names
    in the program.

    Raises:
      ValueError: no program there, or several.
    """
    programs = list(folder.glob("*-TLP-hlo.txt"))
    if len(programs) != 1:
        raise ValueError(f"{len(programs)} programs in {folder}; there must be one")
    computations, entry = instructions(programs[0].read_text())
    known = {i.name: i for body in computations.values() for i in body}
    alike = _alike(folder)
    listings = {
        match[1]: path
        for path in folder.glob("*-packed-bundles-post-ra.txt")
        if (match := re.match(r"\d+-(.*)-\d+-packed-bundles-post-ra", path.name))
    }
    found = []
    schedules: dict[str, Schedule] = {}
    for name, n in times(computations, entry).items():
        listing = alike.get(name, name)
        if listing not in listings:
            continue
        if listing not in schedules:
            tables = dict(enumerate(table_of(known, x) for x in known[listing].operands))
            schedules[listing] = tpu_schedule.read(listings[listing].read_text(), tables)
        found.append(Operation(name, known[name].opcode, n, schedules[listing]))
    return found


def _alike(folder: Path) -> dict[str, str]:
    """Operation -> the one whose code it shares."""
    found = {}
    for path in folder.glob("*-deduplication-map.txt"):
        key = ""
        for line in path.read_text().splitlines():
            if line.startswith("key:"):
                key = line.removeprefix("key:")
            elif line.startswith("  "):
                found[line.strip()] = key
    return found
