"""Hostile input: valid files, mutated, through everything that reads files.

    python -m experiments.fuzz --seconds 60                 every target in turn
    python -m experiments.fuzz --target config --seconds 600 --out found
    python -m experiments.fuzz --atheris -- -max_total_time=600     guided by coverage

What is promised: ``ConfigError`` or ``DataError``, whose message is one line for a person, or no
error; within ``LIMIT`` seconds; with less than ``MEMORY`` more bytes. What breaks that is written
to ``--out`` with its traceback. ``tests/test_hostile.py`` runs a few seconds of the same targets.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import importlib
import json
import logging
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from experiments.fuzz_targets import Target

LIMIT = 20  # seconds of one input
MEMORY = 3 << 30  # bytes that the process may have beyond what it has when it begins
# What has broken readers of files before.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 1 << 16, 1 << 31, (1 << 63) - 1, 1 << 64, 10**40),
    *(0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), "", " ", "a", "\0", "\ud800", "1e5"),
    *("../../etc/passwd", "/dev/null", "..", "a/b", "NaN", "type", "\u2028", "<img onerror=x>"),
    *([], {}, [[]], [None], {"": 0}, [0] * 70, "x" * 3000, "²", "٣", "%s%n{0}", "__class__"),
)
TOKENS = (b"\0", b"\xff", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\n", b'"', b"{", b"[" * 3000)
TOKENS += (b"}", b"9" * 5000, b"-1", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\\ud800")


class TookTooLong(Exception):
    """An input is not done with after ``LIMIT`` seconds."""


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """A few changes: of the values where the seed is JSON (or lines of it), else of the bytes."""
    try:
        data = json.loads(seed)
    except (ValueError, RecursionError):  # the latter of what atheris kept
        return _bytes(seed, rng)
    if rng.random() < 0.25:
        return _bytes(seed, rng)
    try:
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = _changed(data, rng)
        return json.dumps(data).encode()
    except RecursionError:
        return _bytes(seed, rng)


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))


def _changed(data: Any, rng: random.Random) -> Any:
    """JSON data with one node changed."""
    if not isinstance(data, dict | list) or not data or rng.random() < 0.1:
        return _value(rng)
    key = rng.choice(list(data)) if isinstance(data, dict) else rng.randrange(len(data))
    act = rng.random()
    if act < 0.7:
        data[key] = _changed(data[key], rng)
    elif act < 0.8:
        del data[key]
    elif isinstance(data, list):
        data.insert(key, copy.deepcopy(data[key]) if rng.random() < 0.5 else _value(rng))
    else:
        name = rng.choice([str(_value(rng)), *data])
        data[name] = copy.deepcopy(data[key]) if rng.random() < 0.5 else _value(rng)
    return data


def _bytes(seed: bytes, rng: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        act = rng.randrange(6)
        if act == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif act == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif act == 2:
            del data[at:]
        elif act == 3:
            del data[at : at + rng.choice((1, 4, 64))]
        elif act == 4:
            data[at:at] = rng.choice(TOKENS)
        else:
            n = rng.choice((4, 8, 32))
            data[at : at + n] = rng.choice(TOKENS)[:n].ljust(n, b"\xff")
    return bytes(data)


@contextlib.contextmanager
def bounded(seconds: float = LIMIT) -> Iterator[None]:
    """Raises TookTooLong inside where it takes longer (in the main thread, between bytecodes)."""

    def ring(number, frame):
        raise TookTooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_memory(more: int = MEMORY) -> None:
    """From now on this process gets a MemoryError beyond what it has and ``more`` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def tried(target: Target, data: bytes, seconds: float = LIMIT) -> str:
    """What came of an input: "read", or the class of our error. Raises whatever is not ours."""
    try:
        with bounded(seconds):
            target.read(data)
    except (ConfigError, DataError) as error:
        said = str(error)
        assert said.strip(), "an error without a message"
        said.encode()  # it can be printed
        return type(error).__name__
    return "read"


def inputs(target: Target, rng: random.Random) -> Iterator[bytes]:
    """The seeds as they are, then mutations of them, without end."""
    yield from target.seeds
    while True:
        yield mutated(rng.choice(target.seeds), rng)


def fuzz(target: Target, seconds: float, seed: int, out: Path) -> tuple[collections.Counter, int]:
    """(how often what came of it, what was found) of inputs for so long; each kind of error, by
    where it was raised, is written once."""
    counts, found = collections.Counter(), set()
    end, current = time.monotonic() + seconds, out / f"{target.name}.current"
    for data in inputs(target, random.Random(seed)):
        if time.monotonic() > end:
            break
        current.write_bytes(data)  # what is there when a library in C brings the process down
        try:
            counts[tried(target, data)] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception
            counts["FOUND"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            if kind not in found:
                found.add(kind)
                name = out / f"{target.name}-{len(found)}"
                name.with_suffix(".input").write_bytes(data)
                name.with_suffix(".txt").write_text(
                    "".join(traceback.format_exception(error)), errors="backslashreplace"
                )
                print(f"{target.name}: {kind}: {str(error)[:120]!r} ({name}.txt)", flush=True)
    current.unlink(missing_ok=True)
    return counts, len(found)


def with_atheris(atheris: Any, chosen: Target, arguments: list[str]) -> None:
    """libFuzzer drives one target, by our mutations."""

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        made = mutated(data or rng.choice(chosen.seeds), rng)
        return made[:max_size]

    def once(data: bytes) -> None:
        tried(chosen, data)

    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(chosen.seeds):
            Path(corpus, str(i)).write_bytes(seed)
        argv = [sys.argv[0], *arguments, corpus]
        atheris.Setup(argv, once, custom_mutator=mutator)
        atheris.Fuzz()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each target")
    parser.add_argument("--target", action="append", help="name of a target; else all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where finds go")
    parser.add_argument("--atheris", action="store_true", help="coverage-guided; one target")
    parser.add_argument("rest", nargs="*", help="after --: libFuzzer's own arguments")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    atheris = importlib.import_module("atheris") if options.atheris else None
    # What it is to be guided by has to be imported under its eyes.
    watched = atheris.instrument_imports(include=["jaxpt"]) if atheris else contextlib.nullcontext()
    with watched:
        targets = importlib.import_module("experiments.fuzz_targets").targets
    with tempfile.TemporaryDirectory() as folder:
        known = targets(Path(folder))
        if unknown := [name for name in options.target or () if name not in known]:
            parser.error(f"no target {', '.join(unknown)}; known: {', '.join(known)}")
        names = options.target or list(known)
        if atheris:
            with_atheris(atheris, known[names[0]], options.rest)
            return 0
        limit_memory()
        logging.disable(logging.WARNING)  # what sources leave out
        total = 0
        for name in names:
            counts, found = fuzz(known[name], options.seconds, options.seed, options.out)
            total += found
            said = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
            print(f"{name}: {sum(counts.values())} inputs: {said}", flush=True)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
