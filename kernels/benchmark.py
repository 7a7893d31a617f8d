"""Times the implementations of one operation on what is there: ``python -m kernels.benchmark OP``.

An operation is a folder ``kernels/OP``; its ``benchmark.py`` holds

    add_arguments(parser: argparse.ArgumentParser) -> None    # its own options
    rows(args: argparse.Namespace) -> list[dict[str, str | int | float | None]]

a dict a line of the table, whose keys (with their units) head the columns.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "tokamax")


def operations(module: str) -> list[str]:
    """Names of the operations that have a file of this name."""
    here = pathlib.Path(__file__).parent
    return sorted(path.parent.name for path in here.glob(f"*/{module}.py"))


def versions() -> dict[str, str]:
    """Those of Python and of ``PACKAGES`` that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """The date, in UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def stamp(argv: Sequence[str], module: str) -> dict[str, Any]:
    """What makes a table a record: date (UTC), versions, command."""
    return {
        "date": today(),
        "versions": versions(),
        "command": shlex.join(["python", "-m", module, *argv]),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table; a column for each key, in the order in which they come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([shown(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    number = [
        all(isinstance(row.get(c), int | float | None) for row in rows)
        and any(row.get(c) is not None for row in rows)
        for c in columns
    ]

    def line(texts):
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, number, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (w - 1) + (":" if right else "-") for w, right in zip(widths, number, strict=True)
    ]
    return "\n".join([line(cells[0]), line(rule), *(line(texts) for texts in cells[1:])])


def shown(value: Any) -> str:
    """A cell: floats to three figures, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def heading(record: dict[str, Any]) -> str:
    """The record's lines above a table."""
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['chip']}; {packages}; {record['date']}\n{record['command']}\n"


def parser_of(
    module: str, description: str, add: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.ArgumentParser:
    """Of ``python -m kernels.MODULE OP ...``: each operation with such a file adds its options, and
    ``add`` those of all."""
    parser = argparse.ArgumentParser(prog=f"python -m kernels.{module}", description=description)
    parsers = parser.add_subparsers(dest="operation", required=True, metavar="OP")
    for name in operations(module):
        own = importlib.import_module(f"kernels.{name}.{module}")
        sub = parsers.add_parser(name, help=(own.__doc__ or "").split("\n")[0])
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        if add is not None:
            add(sub)
        own.add_arguments(sub)
        sub.set_defaults(own=own)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser_of("benchmark", "Times an operation's implementations.").parse_args(argv)
    device = jax.devices()[0]
    chip = f"{device.device_kind} ({jax.device_count()} of them)"
    record = {"chip": chip, **stamp(argv, "kernels.benchmark")}
    rows = args.own.rows(args)
    if args.json:
        print(json.dumps(record | {"rows": rows}))
    else:
        print(heading(record))
        print(table(rows))


if __name__ == "__main__":
    main()
