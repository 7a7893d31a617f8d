"""``jaxpt plan``: what a config would take on chips that are not here."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import rich.console
from rich.table import Table

from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError, Exit
from jaxpt.files import dumps
from jaxpt.hlo import Collective
from jaxpt.plan import DoesNotFit, Plan, devices_of, plan, program_on
from jaxpt.run import Run

REMATS = ("none", "elementwise", "dots", "full")
MOST_TENSOR = 8  # devices over which a search cuts single matrices


def main(
    run: Run,
    *,
    name: str,
    topology: str | None,
    share: float,
    search: bool,
    batches: tuple[int, ...],
    limit: int,
    json: bool,
) -> int:
    """Plans every phase, or searches for the best layout of the first, and prints.

    Returns:
      The exit code: that of memory that is too small where nothing fits.
    """
    if topology is None:
        raise ConfigError("--topology", "missing; give a chip and a number, as v5e:4x4 or h100:8")
    if not 0 < share <= 1:
        raise ConfigError("--share", f"{share} is not valid; give a share of the peak, up to 1")
    if limit < 1:
        raise ConfigError("--limit", f"{limit} is not valid; give 1 or more")
    if batches and not search:
        raise ConfigError("--batches", "means something with --search alone")
    if any(batch < 1 for batch in batches):
        raise ConfigError("--batches", f"{batches} are not valid; give 1 or more each")
    devices = len(devices_of(topology))  # before the tokenizer, which may take a while
    vocabulary = run.tokenizer.build().vocabulary
    if search:
        tried = candidates(run, devices, batches)
        return _search(tried, f"{name}, {topology}", topology, vocabulary, share, limit, json)
    console, rows, fits = rich.console.Console(), [], True
    for index, phase in enumerate(run.phases):
        try:
            found = plan(program_on(run, topology, vocabulary, index))
        except DoesNotFit as error:
            fits = False
            rows.append({"phase": phase.name, "topology": topology, "does_not_fit": error.message})
            if not json:
                console.print(f"{name}, phase {phase.name}, {topology}: {error.message}")
            continue
        fits = fits and found.fits is not False
        rows.append({"phase": phase.name, "topology": topology} | as_dict(found, share))
        if not json:
            for table in tables(f"{name}, phase {phase.name}, {topology}", found, share):
                console.print(table)
    if json:
        print(dumps(rows, indent=2))
    return Exit.OK if fits else Exit.OUT_OF_MEMORY


def step_seconds(found: Plan, share: float) -> float | None:
    """Of a step that is as slow as the slowest of its parts; None where the chip is not known."""
    return max(found.floors(share).values(), default=None)


def bound(found: Plan, share: float) -> str:
    """Which part that is."""
    floors = found.floors(share)
    return max(floors, key=lambda name: floors[name]) if floors else "unknown"


def as_dict(found: Plan, share: float) -> dict[str, Any]:
    """The plan as JSON has it, with what follows from it."""
    seconds = step_seconds(found, share)
    held = None if found.held is None else found.held[0]
    return dataclasses.asdict(found) | {
        "collectives": [_with_sent(each) for each in found.collectives],
        "asked": found.asked and [{"what": a.what} | _with_sent(a.exchange) for a in found.asked],
        "held": held and [dataclasses.asdict(row) | {"excess": row.excess} for row in held],
        "explained": found.held and found.held[1],
        "peak": found.peak,
        "memory_of_chip": found.chip.memory if found.chip else None,
        "fits": found.fits,
        "share_of_peak": share,
        "floors": found.floors(share),
        "bound": bound(found, share),
        "step_seconds": seconds,
        "tokens_per_second": found.tokens / seconds if seconds else None,
        "days": _days(found, seconds),
    }


def _with_sent(each: Collective) -> dict[str, Any]:
    return dataclasses.asdict(each) | {"sent": each.sent}


def _days(found: Plan, seconds: float | None) -> float | None:
    return seconds * found.steps / 86_400 if seconds and found.steps else None


def tables(title: str, found: Plan, share: float) -> Iterator[Table]:
    """Memory, time and exchanges, for a person."""
    chip, seconds = found.chip, step_seconds(found, share)
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1)
    memory = Table(title=f"{title}: memory of one of {found.devices}, {mesh or 'one device'}")
    for column in ("GB", "what"):
        memory.add_column(column, justify="right" if column == "GB" else "left")
    other = found.arguments - found.parameters - found.state
    for size, what in (
        (found.parameters, "parameters"),
        (found.state, "state of the optimizer and of updates"),
        (other, "the batch"),
        (found.outputs - found.aliased, "outputs that take no argument's place"),
        (found.temporaries, "temporaries: activations, gradients, work space"),
        *_kinds(found),
        (found.peak, "peak" + _verdict(found)),
    ):
        memory.add_row(f"{size / 1e9:,.3f}", what)
    if chip:
        memory.caption = f"{chip.name}: {chip.source}"
    yield memory
    times = Table(title=f"time of a step, {found.tokens:,} positions")
    for column in ("ms", "at least, by"):
        times.add_column(column, justify="right" if column == "ms" else "left")
    amounts = {
        "compute": f"{found.operations:.3g} FLOPs ({found.flops:.3g} of the model's) at "
        f"{share:.0%} of the peak",
        "memory": f"{found.moved / 1e9:,.1f} GB moved between memory and cores",
        "interconnect": f"{(_sent(found) - found.across) / 1e9:,.2f} GB sent over all links",
        "network": f"{found.across / 1e9:,.2f} GB sent to other hosts",
    }
    for name, floor in found.floors(share).items():
        times.add_row(f"{1e3 * floor:,.2f}", f"{name}: {amounts[name]}")
    if seconds:
        times.add_row(f"{1e3 * seconds:,.2f}", f"bound by {bound(found, share)}")
        times.add_row("", f"{found.tokens / seconds:,.0f} tokens/s")
        if days := _days(found, seconds):
            hours = 24 * days * found.devices
            times.add_row("", f"{found.steps:,} steps: {days:,.2f} days, {hours:,.0f} chip-hours")
    else:
        times.add_row("", f"unknown: no figures for {found.device}")
    times.add_row("", f"compiled in {found.seconds:.1f} s")
    if found.loops:
        times.caption = f"counted once, for their length is not known: {', '.join(found.loops)}"
    yield times
    if found.collectives:
        yield _exchanges(found)


def _kinds(found: Plan) -> list[tuple[int, str]]:
    """Of the temporaries, as the program's text has it; all gradients, as the parameters are."""
    rows = [(found.gradients, "  (all gradients at once would be, in the parameters' types)")]
    if found.carried:
        kinds = {
            "kept": "activations kept for the backward pass",
            "made": "gradients of the layers",
            "copies": "copies of parameters, and the gradient of the rows",
        }
        rows = [(found.carried[name], f"  {what}") for name, what in kinds.items()] + rows
    return rows


def _exchanges(found: Plan) -> Table:
    """What the program exchanges and, below, what its sharding asks for."""
    table = Table(title="exchanges of one device in a step")
    for column in ("kind", "axes", "devices", "times", "GB", "GB sent"):
        table.add_column(column, justify="left" if column in ("kind", "axes") else "right")
    for each in found.collectives:
        table.add_row(each.kind, *_amounts(each))
    if found.asked is None or found.held is None:
        table.caption = "no formula says what this model's sharding asks for"
        return table
    table.add_section()
    for one in found.asked:
        table.add_row(f"asked: {one.what}, {one.exchange.kind}", *_amounts(one.exchange))
    held, explained = found.held
    sums = ", ".join(
        f"{' '.join(row.axes)} {row.found / 1e9:,.3f} of {row.asked / 1e9:,.3f}" for row in held
    )
    verdict = "explained" if explained else "NOT explained"
    table.caption = f"{verdict} by what is asked for: GB sent over {sums}"
    return table


def _amounts(each: Collective) -> tuple[str, ...]:
    numbers = f"{each.bytes / 1e9:,.3f}", f"{each.sent / 1e9:,.3f}"
    return " ".join(each.axes), str(each.size), f"{each.count:,}", *numbers


def _sent(found: Plan) -> float:
    return sum(each.sent for each in found.collectives)


def _verdict(found: Plan) -> str:
    if found.chip is None:
        return ""
    verdict = "fits" if found.fits else "does not fit"
    return f": {verdict}, {found.peak / found.chip.memory:.0%} of {found.chip.memory / 1e9:.1f}"


# Search.


def candidates(run: Run, devices: int, batches: tuple[int, ...]) -> Iterator[tuple[Run, str]]:
    """Runs that differ in mesh, remat and batch, and what they are called; those first that cut
    parameters over most devices."""
    phase = run.phases[0]
    model = run.model_of(0)
    remats = REMATS if hasattr(model, "remat") else (None,)
    for batch, remat, tensor in itertools.product(
        batches or (phase.batch,), remats, range(1, MOST_TENSOR + 1)
    ):
        if devices % tensor:
            continue
        rest = devices // tensor
        for data in (n for n in range(1, rest + 1) if rest % n == 0):
            sizes = {"data": data, "fsdp": rest // data, "tensor": tensor, "context": 1}
            mesh = dataclasses.replace(run.mesh, **sizes, devices=None)
            own = dataclasses.replace(phase, batch=batch)
            changed = dataclasses.replace(run, mesh=mesh, phases=(own, *run.phases[1:]))
            if remat is not None:
                field = "model" if phase.model is None else "phases.0.model"
                changed = changed.replace(**{f"{field}.remat": remat})
            name = f"data {data} x fsdp {rest // data} x tensor {tensor}"
            name += f", batch {batch}" + (f", remat {remat}" if remat else "")
            yield changed, name


def _search(
    runs: Iterator[tuple[Run, str]],
    title: str,
    topology: str,
    vocabulary: Vocabulary,
    share: float,
    limit: int,
    json: bool,
) -> int:
    console = rich.console.Console(stderr=json)
    found: list[tuple[str, Plan]] = []
    refused: list[tuple[str, str]] = []
    tried = 0
    for changed, called in runs:
        if tried == limit:
            console.print(f"the first {limit}; --limit has it try more")
            break
        try:
            program = program_on(changed, topology, vocabulary)
            program.check()
        except ConfigError as error:
            refused.append((called, error.message))
            continue
        tried += 1
        try:
            one = plan(program)
        except DoesNotFit as error:
            refused.append((called, error.message))
            continue
        if one.fits is False:
            refused.append((called, f"{one.peak / 1e9:.1f} GB"))
            continue
        found.append((called, one))
        console.print(f"{called}: {_rate(one, share):,.0f} tokens/s, {one.peak / 1e9:.1f} GB")
    found.sort(key=lambda each: -_rate(each[1], share))
    if json:
        rows = [{"name": called} | as_dict(one, share) for called, one in found]
        print(dumps({"fit": rows, "refused": dict(refused)}, indent=2))
    else:
        console.print(_ranked(title, found, refused, share))
    return Exit.OK if found else Exit.OUT_OF_MEMORY


def _rate(found: Plan, share: float) -> float:
    seconds = step_seconds(found, share)
    return found.tokens / seconds if seconds else 0.0


def _ranked(
    title: str, found: list[tuple[str, Plan]], refused: list[tuple[str, str]], share: float
) -> Table:
    table = Table(title=title)
    for column in ("layout", "tokens/s", "bound by", "GB"):
        table.add_column(column, justify="right" if column in ("tokens/s", "GB") else "left")
    for called, one in found:
        rate = f"{_rate(one, share):,.0f}"
        table.add_row(called, rate, bound(one, share), f"{one.peak / 1e9:.2f}")
    for called, why in refused:
        table.add_row(called, "-", why, "-")
    return table
