"""JSON Lines files."""

from __future__ import annotations

import dataclasses
import json

from jaxpt.data.base import Source, Split
from jaxpt.data.files import Documents, Globs, check_holdout, open_documents
from jaxpt.data.skips import BLANK, NOT_UTF8, Bad, Errors, check_errors
from jaxpt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Jsonl(Source):
    """Files of JSON objects, one a line, plain or compressed (``.gz``, ``.zst``).

    A document is the string under ``field``; blank lines are none. Files are read through once
    when they are opened. Plain files are then read line by line on access; compressed ones
    are kept in memory.
    """

    train: Globs = ()  # files to train on: a path or glob, or several (** goes into folders)
    validation: Globs | None = None  # files to validate on; None: a share of the lines of train
    field: str = "text"  # key of the text in each object
    holdout: float = 0.01  # share of the lines that is validation where no files are named for it
    check: bool = True  # parse every line when opening, so that a bad one is found before training
    # a line that is no object or lacks the text, a broken file: raise an error, or skip and count
    errors: Errors = "raise"

    def __post_init__(self):
        check_holdout(self.holdout)
        check_errors(self.errors)
        if self.errors == "skip" and not self.check:
            raise ConfigError("check", "errors = skip needs it: bad lines are found when opening")

    def open(self, split: Split) -> Documents:
        """The documents of a split.

        Raises:
          ConfigError: a glob that matches nothing, or a split without documents.
          DataError: a file that cannot be read; where ``errors`` is raise, also a line that is
            not UTF-8, does not parse, or lacks the field (on access, if ``check`` is off).
        """
        return open_documents(
            self.train,
            self.validation,
            self.holdout,
            split,
            "line",
            Field(self.field),
            self.errors,
            self.check,
        )


@dataclasses.dataclass(frozen=True)
class Field:
    """Takes a field out of the bytes of a JSON object. Raises Bad."""

    name: str

    def __call__(self, data: bytes) -> str:
        try:
            record = json.loads(data.decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError as error:
            raise Bad(NOT_UTF8, f"not UTF-8: {error.reason}") from None
        except json.JSONDecodeError as error:
            raise Bad("not JSON", f"not JSON: {error.msg} (column {error.colno})") from None
        except RecursionError:
            raise Bad("not JSON", "not JSON that can be read: nested too deep") from None
        except ValueError:  # a number of thousands of digits
            raise Bad("not JSON", "not JSON that can be read: a number is too long") from None
        if not isinstance(record, dict):
            raise Bad("not an object", f"not an object but {type(record).__name__}")
        if self.name not in record:
            known = ", ".join(sorted(record)) or "none"
            raise Bad(f"no field {self.name!r}", f"no field {self.name!r}; its fields: {known}")
        return usable(record[self.name], f"field {self.name!r}")


def usable(text: object, what: str) -> str:
    """``text`` if it is a string that can be used; ``what`` it is called if it is not.

    Raises:
      Bad: it is no string, blank, or has half a surrogate pair, which UTF-8 cannot write.
    """
    if not isinstance(text, str):
        raise Bad("not a string", f"{what} is {type(text).__name__}, not a string")
    if not text or text.isspace():
        raise Bad(BLANK, f"{what} is blank: it holds no text")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise Bad(NOT_UTF8, f"{what} has half of a surrogate pair") from None
    return text
