"""Reads the machine code that the TPU compiler scheduled, and counts its cycles without a TPU.

libtpu writes a listing of each operation, one bundle of instructions a line:

    0x19 LB: > { %s15 = sadd.s32 1, %s14  ;;  %9 = sbr.rel (!%p3) target bundleno = 25 (0x19) }

A bundle is issued each cycle. In ``packed-bundles-post-ra`` every bundle has its address and empty
ones are kept (they are the scheduled stalls), so addresses are cycles. A branch takes effect after
four more bundles. To know how often each stretch runs, the scalar instructions on which branches
depend are carried out: 32-bit integers, predicates, and scalar memory with the tables that the
program brings along. What that gives is exact but for waiting: on DMA, or on other cores.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence

DELAY = 4  # bundles after a branch that run before it is taken
GRANULE = 32  # bytes in which DMA sizes are given
WORD = (1 << 32) - 1
MOST = 5_000_000  # blocks to run before giving up
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s*(?:[A-Z]{2})?\s*:(?:\s*>)*\s*\{")
_OP = re.compile(r"^(?:(%[\w.]+)\s*=\s*)?([a-z_][\w.]*)\s*(.*)$", re.S)
_OPERAND = re.compile(r"!?%[\w.]+|\[#[^\]]*\]|-?\d+")
_TARGET = re.compile(r"target bundleno = (\d+)")
_PREDICATE = re.compile(r"\((!?%[\w.]+)\)")
_GRANULES = re.compile(r"size_in_granules=(\d+)")


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction: ``result = name text``."""

    result: str | None
    name: str
    text: str

    @property
    def operands(self) -> list[str]:
        return _OPERAND.findall(re.sub(r"\[(resolvable|thread|deref)[^\]]*\]", " ", self.text))

    @property
    def predicate(self) -> str | None:
        match = _PREDICATE.search(self.text)
        return match[1] if match else None


@dataclasses.dataclass
class Block:
    """A stretch of bundles [begin, end) that is entered at its first and left at its last."""

    begin: int
    end: int
    ops: list[Op]
    branch: tuple[int, str | None] | None = None  # target, predicate
    header: bool = False  # of a loop
    count: int = 0  # how often it ran

    @property
    def bundles(self) -> int:
        return self.end - self.begin


@dataclasses.dataclass
class Schedule:
    """What ``run`` found of one operation. ``unknown``: branches whose predicate depends on data
    that is not there; each such time the branch was not taken (its body ran)."""

    blocks: list[Block]
    transfers: collections.Counter[tuple[str, int]]  # (direction, bytes) -> how many
    unknown: int

    @property
    def cycles(self) -> int:
        return sum(block.bundles * block.count for block in self.blocks)

    @property
    def hottest(self) -> Block:
        """The block in which most cycles go."""
        return max(self.blocks, key=lambda block: block.bundles * block.count)

    def moved(self) -> int:
        """Bytes between HBM and the core, both ways."""
        return sum(n * size for (way, size), n in self.transfers.items() if "hbm" in way)

    def issued(self, matches: Callable[[Op], bool]) -> int:
        """How many instructions ran for which this holds."""
        return sum(b.count * sum(map(matches, b.ops)) for b in self.blocks)

    def again(self, tables: Mapping[int, Sequence[int]]) -> Schedule:
        """The same code with other tables; see ``read``."""
        blocks = [dataclasses.replace(block, count=0) for block in self.blocks]
        return Machine(blocks, tables).run(MOST)

    def spills(self) -> int:
        """Stores and loads of vector registers for want of registers."""
        return self.issued(is_spill)


def is_matmul(op: Op) -> bool:
    return op.name.startswith("vmatmul")


def is_spill(op: Op) -> bool:
    return op.name.startswith(("vst", "vld")) and "_spill" in op.text


def parse(text: str) -> list[Block]:
    """The blocks of a listing.

    Raises:
      ValueError: there is no bundle in it.
    """
    bundles = _bundles(text)
    if not bundles:
        raise ValueError("no bundles: this is not a listing of packed bundles")
    branches = {}
    for at, ops in bundles.items():
        for op in ops:
            target = _TARGET.search(op.text) if op.name.startswith("sbr") else None
            if target is not None:
                branches[at] = (int(target[1]), op.predicate)
    end = max(bundles) + 1
    starts = {min(bundles), *(t for t, _ in branches.values()), *(a + DELAY + 1 for a in branches)}
    starts = sorted(at for at in starts if at < end)
    back = {target for at, (target, _) in branches.items() if target <= at}
    blocks = []
    for begin, stop in zip(starts, [*starts[1:], end], strict=True):
        inside = [at for at in range(begin, stop) if at in bundles]
        block = Block(begin, stop, [op for at in inside for op in bundles[at]])
        block.branch = next((branches[at] for at in inside if at in branches), None)
        block.header = begin in back
        blocks.append(block)
    return blocks


def _bundles(text: str) -> dict[int, list[Op]]:
    """Address -> instructions, each bundle's phis first: they take effect before the rest."""
    raw: dict[int, list[str]] = {}
    at = None
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            at = int(match[1], 0)
            raw[at] = [line[match.end() :]]
        elif at is not None:
            raw[at].append(line)
    bundles = {}
    for at, lines in raw.items():
        body = re.sub(r"/\*(size_in_granules=)\*/\s*", r" \1", "\n".join(lines))
        body = re.sub(r"/\*.*?\*/", " ", body, flags=re.S)
        matches = (_OP.match(part.strip()) for part in body[: body.rindex("}")].split(";;"))
        ops = [Op(m[1], m[2], m[3]) for m in matches if m]
        bundles[at] = sorted(ops, key=lambda op: op.name != "sphi")
    return bundles


def _signed(x: int) -> int:
    return (x ^ (1 << 31)) - (1 << 31)


_COMPARE = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[..., int]] = {
    "sadd": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": lambda a, b: a << (b & 31),
    "sshrl": lambda a, b: a >> (b & 31),
    "sshra": lambda a, b: _signed(a) >> (b & 31),
    "pand": lambda a, b: bool(a) and bool(b),
    "por": lambda a, b: bool(a) or bool(b),
    "pnand": lambda a, b: not (a and b),
    "pnor": lambda a, b: not (a or b),
    "pxor": lambda a, b: bool(a) != bool(b),
    "pneg": operator.not_,
    "pmov": lambda a: a,
    "scalar_lea": operator.add,
    "int_to_ptr": lambda a: a,
}


class Machine:
    """The scalar core: runs blocks, with values that may be unknown (None)."""

    def __init__(self, blocks: Sequence[Block], tables: Mapping[int, Sequence[int]]):
        self.blocks, self.tables = blocks, tables
        self.values: dict[str, int | None] = {}
        self.memory: dict[int, int | None] = {}
        self.places: dict[str, int] = {}  # of allocations, far from each other
        self.made_by = {op.result: op for block in blocks for op in block.ops if op.result}
        self.transfers: collections.Counter[tuple[str, int]] = collections.Counter()
        self.unknown = 0
        needed = self._needed()
        self.work = [[op for op in b.ops if self._matters(op, needed)] for b in blocks]

    def _matters(self, op: Op, needed: set[str]) -> bool:
        return op.name.startswith(("dma.", "sst")) or op.result in needed

    def _needed(self) -> set[str]:
        """Names on which branches, transfers and scalar memory depend."""
        todo = []
        for block in self.blocks:
            todo += [block.branch[1]] if block.branch and block.branch[1] else []
            for op in block.ops:
                if op.name.startswith("sst"):
                    todo += re.findall(r"%[\w.]+", op.text)
                elif op.name.startswith("dma."):
                    todo += [op.predicate] if op.predicate else []
                    todo += op.operands if op.name.endswith("_to_smem") else []
        needed: set[str] = set()
        while todo:
            name = todo.pop().lstrip("!")
            if name.startswith("%") and name not in needed:
                needed.add(name)
                if name in self.made_by:
                    todo += re.findall(r"%[\w.]+", self.made_by[name].text)
        return needed

    def run(self, most: int) -> Schedule:
        """Runs from the first block until one is left at the end of the listing.

        Raises:
          RuntimeError: it has not ended after ``most`` blocks.
        """
        index = {block.begin: n for n, block in enumerate(self.blocks)}
        at, back = 0, False
        for _ in range(most):
            block = self.blocks[at]
            block.count += 1
            for op in self.work[at]:
                self._do(op, block.header, back)
            after, back = at + 1, False
            if block.branch is not None:
                target, predicate = block.branch
                taken = True if predicate is None else self._value(predicate)
                if taken is None:
                    self.unknown += 1
                if taken:
                    after, back = index.get(target, len(self.blocks)), target <= block.begin
            if after >= len(self.blocks):
                return Schedule(list(self.blocks), self.transfers, self.unknown)
            at = after
        raise RuntimeError(f"no end after {most} blocks: a loop's bound may depend on data")

    def _do(self, op: Op, header: bool, back: bool) -> None:
        if op.name.startswith("dma."):
            self._transfer(op)
        elif op.name.startswith("sst"):
            where, value = re.fullmatch(r"\[smem:\[(.*?)\]\](.*)", op.text, re.S).groups()  # pyright: ignore[reportOptionalMemberAccess]
            place = self._address(where)
            if place is not None and self._allowed(op) is not False:
                known = self._allowed(op) is True
                self.memory[place] = self._value(_OPERAND.findall(value)[-1]) if known else None
        elif op.name == "sphi":
            first, *others = op.operands
            take = others[0] if back and header and others else first
            if not header and others:
                take = others[-1]
            self.values[op.result or ""] = self._value(take)
        else:
            self.values[op.result or ""] = self._result(op)

    def _allowed(self, op: Op) -> bool | None:
        """Whether the instruction's predicate holds."""
        if op.predicate is None:
            return True
        value = self._value(op.predicate)
        return None if value is None else bool(value)

    def _transfer(self, op: Op) -> None:
        size = _GRANULES.search(op.text)
        if size is None or self._allowed(op) is False:
            return
        way = "hbm" if op.name == "dma.general" else op.name.removeprefix("dma.")
        self.transfers[way, int(size[1]) * GRANULE] += 1
        if not way.endswith("_to_smem"):
            return
        # A table comes in: its words, where the program holds them.
        source, *others = [x for x in op.operands if x != op.predicate]
        place = self._value(next(x for x in others if not x.isdigit()))
        words = self.tables.get(self._operand_number(source), ())
        if place is not None:
            for n, word in enumerate(words):
                self.memory[place + n] = word & WORD

    def _operand_number(self, name: str) -> int:
        """Which operand of the call an address was made of; -1 of none."""
        while name in self.made_by:
            op = self.made_by[name]
            if op.name.startswith("inlined_call_operand"):
                number = re.search(r"index: (\d+)", op.text)
                return int(number[1]) if number else -1
            name = next((x for x in op.operands if x.startswith("%")), "")
        return -1

    def _address(self, text: str) -> int | None:
        """Of ``#allocation6 + %s1``, ``%s1 + %s2`` or ``#allocation6 + $0x2``."""
        total = 0
        for term in text.split("+"):
            value = self._value(term.strip())
            if value is None:
                return None
            total += value
        return total

    def _value(self, name: str) -> int | None:
        if name.startswith("!"):
            value = self._value(name[1:])
            return None if value is None else not value
        if name.startswith("%"):
            return self.values.get(name)
        if name.startswith("["):
            return self._address(name[1:-1])
        if name.startswith("#"):
            return self.places.setdefault(name, (len(self.places) + 1) << 20)
        return int(name.lstrip("$"), 0) & WORD

    def _result(self, op: Op) -> int | None:
        base, _, kind = op.name.partition(".")
        if base == "sld":
            where = re.fullmatch(r"\[smem:\[(.*?)\]\].*", op.text, re.S)
            place = self._address(where[1]) if where else None
            return None if place is None else self.memory.get(place)
        if op.name == "inlined_call_operand.":  # in no memory: a table of one word is the word
            words = self.tables.get(self._operand_number(op.result or ""), ())
            return words[0] & WORD if words else None
        values = [self._value(x) for x in op.operands]
        if base == "scalar_select" or (base == "smov" and len(values) == 3):
            chosen, yes, no = values
            if base == "smov":  # (p, old), new
                yes, no = no, yes
            return None if chosen is None else yes if chosen else no
        if base == "smov":
            return values[-1]
        if base in ("smin", "smax", "scmp"):
            return self._ordered(base, kind, values)
        if base not in _ARITHMETIC:
            return None
        if op.text.startswith("(") and len(values) == 3:
            values = values[1:]  # carried out only where the predicate holds; else not used
        if any(x is None for x in values):
            return None
        return (
            int(_ARITHMETIC[base](*values[: 1 if base in ("pneg", "pmov", "int_to_ptr") else 2]))
            & WORD
        )

    def _ordered(self, base: str, kind: str, values: Sequence[int | None]) -> int | None:
        a, b = values[-2:]
        if a is None or b is None:
            return None
        if "u32" not in kind:
            a, b = _signed(int(a)), _signed(int(b))
        if base == "scmp":
            return _COMPARE[kind.split(".")[0]](a, b)
        return (min(a, b) if base == "smin" else max(a, b)) & WORD


def read(
    text: str, tables: Mapping[int, Sequence[int]] | None = None, most: int = MOST
) -> Schedule:
    """The schedule of one operation from its listing.

    Args:
      text: of ``packed-bundles-post-ra``.
      tables: words of the call's operands that it brings into scalar memory, by their number.
      most: blocks to run before giving up.

    Raises:
      ValueError: not such a listing.
      RuntimeError: it does not end.
    """
    return Machine(parse(text), tables or {}).run(most)
