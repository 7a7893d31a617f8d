"""What a compiled program moves, from the text of its HLO: between memory and cores, and between
devices.

Counted over loops by their trips, which XLA's own cost analysis does not do. All sizes are those
of one device.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from kernels.tpu_program import Instruction, instructions, trips

_ARRAY = re.compile(r"\b(pred|bf16|token|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NAME = re.compile(r"%([\w.\-]+)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# A mesh of its own, with the devices in some order, and those of its axes along which groups lie.
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([\d,]+\))?)\))? \{([^}]*)\}"
)
_TURNED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")
_CHAIN = re.compile(r'channel_id=(\d+),.*chain_id="')

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SAME = ("bitcast", "copy", "get-tuple-element", "copy-start", "copy-done")
_RUNS = ("while", "conditional", "call", "async-start", "fusion")
# What moves nothing by itself.
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "opt-barrier",
    "optimization-barrier",
    "after-all",
    "partition-id",
    "replica-id",
    "async-start",
    "iota",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Exchanges of one kind over one group of devices, all those of one step together.

    axes: mesh axes that the group lies along; () where it is no block of the mesh.
    size: devices of a group.
    count: how often a device takes part.
    bytes: of the arrays that are gathered, reduced or passed on: whole, as one device sees them.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends at least: on a ring, (size - 1) / size of the array, and that
        twice where it is reduced and handed out again."""
        if self.kind == "collective-permute":
            return self.bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.size - 1) / self.size


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device moves in a step. Of conditionals every branch counts.

    bytes: read from memory and written to it, each operation by itself: what stays in caches is
      not known of.
    across: of what is sent in the collectives, bytes of those whose groups span hosts.
    loops: those whose trips the text does not say, counted as one.
    """

    bytes: int
    collectives: tuple[Collective, ...]
    across: float
    loops: tuple[str, ...]


def traffic(text: str, mesh: Mapping[str, int], host: int | None = None) -> Traffic:
    """Reads a program's text (``jax.stages.Compiled.as_text()``).

    Args:
      mesh: sizes of the mesh axes by name, in the order of the devices.
      host: devices of a host; None: all are of one.
    """
    computations, entry = instructions(text)
    loops: list[str] = []
    moved = 0
    found: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0])
    devices = math.prod(mesh.values())
    afar: set[tuple] = set()
    chains: set[str] = set()
    for instruction, here, times, fused in _run(computations, entry, loops):
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            # A TPU's may be spread over several fused operations, each of which names all of it.
            if fused and (chain := _CHAIN.search(instruction.text)):
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            group = _group(instruction.text) or range(devices)
            if len(group) > 1:
                kind, payload = _payload(kind, instruction, here, len(group), fused=fused)
                key = kind, _axes(group, mesh), len(group)
                found[key][0] += times
                found[key][1] += times * payload
                if host is not None and len({device // host for device in group}) > 1:
                    afar.add(key)
        elif not fused:
            moved += times * _moved(instruction, computations, here)
    collectives = {key: Collective(*key, *counts) for key, counts in found.items()}
    across = sum(collectives[key].sent for key in afar)
    ordered = sorted(collectives.values(), key=lambda each: -each.sent)
    return Traffic(moved, tuple(ordered), across, tuple(loops))


def _run(
    computations: Mapping[str, list[Instruction]], entry: str, loops: list[str]
) -> Iterator[tuple[Instruction, dict[str, Instruction], int, bool]]:
    """(instruction, those of its computation by name, how often it runs, whether it is part of a
    fused operation), of all that the program runs. Of a conditional every branch counts."""

    def visit(name: str, times: int, fused: bool):
        here = {i.name: i for i in computations.get(name, ())}
        for instruction in here.values():
            yield instruction, here, times, fused
            if instruction.opcode not in _RUNS:
                continue
            each = times
            if instruction.opcode == "while":
                try:
                    each = times * trips(computations, instruction)
                except ValueError:
                    loops.append(instruction.name)
            called = _CALLED.findall(instruction.text)
            for branches in _BRANCHES.findall(instruction.text):
                called += _NAME.findall(branches)
            for name_of_called in called:
                yield from visit(name_of_called, each, fused or instruction.opcode == "fusion")

    yield from visit(entry, 1, False)


def size_of(shape: str) -> int:
    """Bytes of an array or a tuple of them, as HLO writes their shapes; tokens have none."""
    return sum(_sizes(shape))


def _sizes(shape: str) -> list[int]:
    found = []
    for name, bits, sizes in _ARRAY.findall(shape):
        width = 8 if name == "pred" else 16 if name == "bf16" else int(bits or 0)
        count = math.prod(int(n) for n in sizes.split(",") if n)
        found.append(-(-count * width // 8))
    return found


def _payload(
    kind: str, instruction: Instruction, here: Mapping[str, Instruction], size: int, *, fused: bool
) -> tuple[str, int]:
    """(the kind, bytes of the whole arrays). A TPU's reduce-scatter is an all-reduce in a fusion
    that goes on with slices."""
    total = sum(size_of(here[name].shape) for name in instruction.operands if name in here)
    if kind == "all-gather":
        return kind, total * size
    if kind == "all-reduce" and fused and _sliced(instruction, here):
        return "reduce-scatter", total
    return kind, total


def _sliced(instruction: Instruction, here: Mapping[str, Instruction]) -> bool:
    """Whether of a result, or of a part of it, only a slice is used."""
    names = {instruction.name}
    for i in here.values():  # in order of their use
        if not names.isdisjoint(i.operands[:1]):
            if i.opcode == "dynamic-slice":
                return True
            if i.opcode in ("get-tuple-element", "bitcast", "copy"):
                names.add(i.name)
    return False


def _group(text: str) -> list[int]:
    """Devices of the first group of a collective; [] where it is all of them.

    Raises:
      ValueError: groups written in a way that is not known.
    """
    if listed := _LISTED.search(text):
        return _numbers(listed[1])
    if iota := _IOTA.search(text):
        return _turned(iota[2], iota[3]).reshape(_numbers(iota[1]))[0].tolist()
    if named := _MESH.search(text):
        return _along(*named.groups())
    if pairs := _PAIRS.search(text):  # a ring, or several: the one that the first device is in
        numbers = [int(n) for n in re.findall(r"\d+", pairs[1])]
        passes = dict(zip(numbers[::2], numbers[1::2], strict=True))
        ring, at = [], numbers[0]
        while at not in ring:
            ring.append(at)
            at = passes.get(at, numbers[0])
        return sorted(ring)
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"groups of devices that nothing here can read: {text[:200]}")
    return []


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _turned(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in this shape, with its dimensions in another order."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def _along(mesh: str, devices: str | None, axes: str) -> list[int]:
    """The first group along ``axes`` of a mesh like ``'a'=2,'b'=4``, whose devices are counted, are
    listed or lie as ``_turned`` has them. Of an axis a part may be taken: ``'b':(1)2``, sizes of
    what comes before it and of the part."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    turned = _TURNED.match(devices or "")
    if turned:
        ids = _turned(turned[1], turned[2]).reshape(-1)
    else:
        ids = np.array(_numbers(devices)) if devices else np.arange(math.prod(sizes.values()))
    parts = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    ids = ids.reshape(list(sizes.values()))
    taken = []
    for name, size in sizes.items():
        before, own = parts.get(name, (1, 1))
        taken.append(np.arange(own) * (size // (before * own)))
    return np.sort(ids[np.ix_(*taken)].reshape(-1)).tolist()


def _axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a group of devices lies."""
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    return tuple(
        name for name, along in zip(mesh, places, strict=True) if len(np.unique(along)) > 1
    )


def _moved(
    instruction: Instruction,
    computations: Mapping[str, list[Instruction]],
    here: Mapping[str, Instruction],
) -> int:
    """Bytes that an operation reads and writes, of slices what is sliced."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    written = size_of(instruction.shape)
    operands = [size_of(here[name].shape) for name in instruction.operands if name in here]
    if opcode in ("dynamic-slice", "gather"):
        return 2 * written
    if opcode == "dynamic-update-slice":
        return 2 * operands[1] if len(operands) > 1 else 0
    if opcode == "broadcast":
        return written
    if opcode != "fusion":
        return written + sum(operands)
    called = _CALLED.search(instruction.text)
    body = computations.get(called[1], []) if called else []
    return _fusion(body, written, operands)


def _fusion(body: Sequence[Instruction], written: int, operands: Sequence[int]) -> int:
    """Bytes that a fused operation reads and writes: of a parameter that is only sliced the
    slices, of one that is updated in place the update."""
    known = {i.name: i for i in body}
    total = written
    for parameter in body:
        number = re.match(r"(\d+)\)", parameter.text)
        if parameter.opcode != "parameter" or number is None or int(number[1]) >= len(operands):
            continue
        whole = operands[int(number[1])]
        users, names = [], {parameter.name}
        for i in body:  # in order of their use; what only renames it is it
            if not names.isdisjoint(i.operands):
                if i.opcode in ("bitcast", "copy") and size_of(i.shape) == whole:
                    names.add(i.name)
                else:
                    users.append(i)
        if users and all(i.opcode in ("dynamic-slice", "gather") for i in users):
            total += min(whole, sum(size_of(i.shape) for i in users))
        elif (
            len(users) == 1
            and users[0].opcode == "dynamic-update-slice"
            and users[0].operands[0] in names
        ):
            update = known.get(users[0].operands[1])
            changed = size_of(update.shape) if update else whole
            total += changed - min(whole, total)
        else:
            total += whole
    return total


ORIGINS: tuple[str, ...] = ("arguments", "kept", "made", "copies")


def carried(text: str) -> dict[str, int]:
    """Bytes of what the program's fullest loop, the layers' backward pass, carries, by origin:

    arguments: what the program is given.
    kept: results of an earlier loop: what the forward pass keeps for this one.
    made: what it fills: the layers' gradients.
    copies: what was made of the rest before it began: parameters in another type, say.

    {} where there is no loop of the program itself (layers that are not scanned).
    """
    computations, entry = instructions(text)
    known = {i.name: i for i in computations[entry]}
    loops = [i for i in computations[entry] if i.opcode == "while"]
    if not loops:
        return {}
    fullest = max(loops, key=lambda i: size_of(i.shape))
    found: dict[str, int] = dict.fromkeys(ORIGINS, 0)
    for name in known[fullest.operands[0]].operands:
        if name in known and "S(1)" not in known[name].shape:  # which is no HBM
            found[_origin(name, known, computations)] += size_of(known[name].shape)
    return found


_ORIGINS = {"parameter": "arguments", "while": "kept", "broadcast": "made", "constant": "made"}


def _origin(
    name: str, known: Mapping[str, Instruction], computations: Mapping[str, list[Instruction]]
) -> str:
    """Which of ``carried``'s origins an array of a computation has."""
    while (here := known[name]).opcode in _SAME:
        name = here.operands[0]
        source, place = known[name], re.search(r"index=(\d+)", here.text)
        if source.opcode == "while" and place:
            body = re.search(r"body=%([\w.\-]+)", source.text)
            if not body or not _unchanged(computations[body[1]], int(place[1])):
                return "kept"
            name = known[source.operands[0]].operands[int(place[1])]
    fresh = here.opcode == "custom-call" and "AllocateBuffer" in here.text
    sources = [known[name] for name in here.operands if name in known]
    filled = here.opcode == "fusion" and all(size_of(each.shape) <= 8 for each in sources)
    if fresh or filled:
        return "made"
    return _ORIGINS.get(here.opcode, "copies")


def _unchanged(body: Sequence[Instruction], place: int) -> bool:
    """Whether a loop's body hands on what it was given at this place."""
    given = next((i for i in body if i.name == body[-1].operands[place]), None)
    return (
        given is not None
        and given.opcode == "get-tuple-element"
        and (re.search(rf"index={place}\b", given.text) is not None)
    )
