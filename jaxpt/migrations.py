"""What a run's folder names and what is now called otherwise: stated here, once, for all time.

A checkpoint names arrays by their paths and config.json classes by their modules. Whoever renames
a module of a network, an entry of an optimizer's state or a config class adds a row below; then a
folder that was written before is restored, started from, evaluated and exported as ever.

``FORMAT`` is that of the manifests that are written; an older one is read with every row of a
later format applied, in order. A change of array names takes the next format.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from jaxpt.errors import DataError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A part of arrays' paths that has another name from a format on.

    since: the first format that has the new name.
    old: regular expression of whole names and the slashes between them: ``mlp/in_proj``,
      ``layers_(\\d+)``. It is looked for anywhere in a path: so one row serves the parameter
      (``params/mlp/in_proj/w``) and all that an optimizer or an update keeps under its name.
    new: what takes its place; ``\\1`` is the first group.
    """

    since: int
    old: str
    new: str


ARRAYS: tuple[Renamed, ...] = ()
# "jaxpt.module:Class" as it was -> as it is. Fields that were renamed keep no trace: give a new
# field a default that means what was done before it came.
CLASSES: dict[str, str] = {}


def paths(saved: Iterable[str], written: int) -> dict[str, str]:
    """Each path's name today -> as it was saved.

    Args:
      written: the format that the checkpoint was written in.

    Raises:
      DataError: the checkpoint is of a later format than this code knows.
    """
    if written > FORMAT:
        raise DataError(
            f"it was written by a later jaxpt, in format {written}; this one reads up to {FORMAT}"
        )
    return {_today(path, written): path for path in saved}


def _today(path: str, written: int) -> str:
    for row in ARRAYS:
        if row.since > written:
            path = re.sub(rf"(?<![^/])(?:{row.old})(?![^/])", row.new, path)
    return path


def class_tag(tag: str) -> str:
    """What a class of config.json is called today."""
    return CLASSES.get(tag, tag)
