"""Strict types and JSON for trees of frozen dataclasses: one mechanism for both.

A dataclass becomes an object with its class in ``"type"``, a tuple becomes a list, numbers,
strings, booleans and None are themselves. Read back, every value must have exactly the type
that its field declares (an int may stand for a float); nothing is converted. ``check`` holds a
value built in Python to the same rules.

Only frozen dataclasses are ever instantiated: those of the jaxpt package
(``jaxpt.objectives.ul2:UL2``), and those that a config file, which the user has named, shows
(``config:MyObjective``).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import cattrs

from jaxpt import migrations
from jaxpt.config import tree
from jaxpt.errors import ConfigError

T = TypeVar("T")
PACKAGE = "jaxpt"
JAXPT_TAG = re.compile(rf"{PACKAGE}((?:\.[a-z][a-z0-9_]*)+):([A-Za-z][A-Za-z0-9_]*)", re.ASCII)
LONGEST_TAG = 250  # characters; a longer one could be no file's name
SCALARS = (bool, int, float, str, type(None))


def check(value: T) -> T:
    """Holds every field of a config to its declared type, all the way down, and returns it.

    Raises:
      ConfigError: the first field that breaks it, with its dotted path and what is valid there.
    """
    return check_as(value, type(value))


def check_as(value: T, kind: Any) -> T:
    """``check`` of a value that stands where ``kind`` is declared. Raises ConfigError."""
    classes: dict[str, type] = {}
    data = unstructure(value, classes)
    rebuilt = _converter_for(classes).structure(data, kind)
    if rebuilt != value:
        raise ConfigError("", f"{_short(data)} changes when it is saved and read back")
    return value


def to_json(value: Any) -> str:
    """A config as JSON text, which ``from_json`` turns into an equal value.

    Raises:
      ConfigError: a value that has no JSON form, with its dotted path.
    """
    return json.dumps(unstructure(value, {}), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str, kind: type[T], config_module: types.ModuleType | None = None) -> T:
    """The config that ``to_json`` wrote.

    Args:
      text: JSON.
      kind: the class that it must be.
      config_module: the user's config file as a module, for classes that it defines or imports.

    Raises:
      ConfigError: no JSON, a class that may not be instantiated, unknown or missing or ill-typed
        fields, or what a dataclass says to its values; with the dotted path.
    """
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("config.json", f"is no JSON: {error}") from None
    return _converter_for(visible_classes(config_module)).structure(data, kind)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(twice, "given twice")
    return found


# ------------------------------------------------------------------------------ classes and tags


def _frozen_dataclass(cls: Any) -> bool:
    return (
        isinstance(cls, type)
        and "__dataclass_params__" in vars(cls)
        and cls.__dataclass_params__.frozen
    )


def tag_of(cls: type) -> str:
    """The name under which a dataclass is saved. Raises ConfigError if it cannot be."""
    if not _frozen_dataclass(cls):
        raise ConfigError(
            "", f"{cls.__qualname__} is no frozen dataclass; write @dataclass(frozen=True) above it"
        )
    tag = f"{cls.__module__}:{cls.__qualname__}"
    return tag if JAXPT_TAG.fullmatch(tag) else f"config:{cls.__qualname__}"


def visible_classes(module: types.ModuleType | None) -> dict[str, type]:
    """The frozen dataclasses that a config file shows (or holds in its ``run``), by tag."""
    if module is None:
        return {}
    found: dict[str, type] = {}
    for value in vars(module).values():
        if _frozen_dataclass(value):
            found[tag_of(value)] = value
    run = getattr(module, "run", None)
    if tree.is_config(run):
        unstructure(run, found)
    return {tag: cls for tag, cls in found.items() if tag.startswith("config:")}


def class_of(tag: Any, classes: Mapping[str, type]) -> type:
    """The class that a tag names.

    Nothing is imported until the tag is known to name a class statement in a module file of the
    jaxpt package.

    Raises:
      ConfigError: the tag names nothing that may be instantiated.
    """
    if not isinstance(tag, str):
        raise ConfigError("type", f"{_short(tag)} names no class")
    if tag in classes:
        return classes[tag]
    tag = migrations.class_tag(tag)
    if tag.startswith("config:"):
        known = (
            f"; it shows: {', '.join(t.removeprefix('config:') for t in classes)}"
            if classes
            else ""
        )
        raise ConfigError(
            "type",
            f"{_short(tag)} is a class of a config file, which must be given, and show it{known}",
        )
    match = JAXPT_TAG.fullmatch(tag) if len(tag) < LONGEST_TAG else None
    if match and match.group(2) in _classes_in(match.group(1).lstrip(".")):
        cls: Any = getattr(importlib.import_module(PACKAGE + match.group(1)), match.group(2), None)
        if _frozen_dataclass(cls):
            return cls
    raise ConfigError(
        "type", f"{_short(tag)} is no config of {PACKAGE}, and only those are ever built from JSON"
    )


@functools.cache
def _classes_in(module: str) -> frozenset[str]:
    """Names of the classes at the top of a module of jaxpt, from its source alone."""
    root = Path(__file__).resolve().parents[1].joinpath(*module.split("."))
    for path in (root.with_suffix(".py"), root / "__init__.py"):
        if path.is_file():
            body = ast.parse(path.read_bytes()).body
            return frozenset(node.name for node in body if isinstance(node, ast.ClassDef))
    return frozenset()


# ------------------------------------------------------------------------------ value -> data


def unstructure(value: Any, classes: dict[str, type]) -> Any:
    """A config as JSON data (dicts, lists, scalars).

    ``classes`` receives the tag of each dataclass met. Raises ConfigError, with the dotted path,
    for values without a JSON form.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError("", f"{value} is not a number that a config can hold")
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, tuple):
        return [_at(str(i), unstructure, v, classes) for i, v in enumerate(value)]
    if tree.is_config(value):
        cls = type(value)
        tag = tag_of(cls)
        if classes.setdefault(tag, cls) is not cls:
            raise ConfigError("", f"two classes are called {cls.__qualname__}; rename one")
        data = {"type": tag}
        for name in tree.field_types(cls):
            if name == "type":
                raise ConfigError("type", f"{cls.__qualname__} has a field called type; rename it")
            data[name] = _at(name, unstructure, getattr(value, name), classes)
        return data
    hint = "; write a tuple" if isinstance(value, list) else ""
    raise ConfigError("", f"a {type(value).__name__} cannot stand in a config{hint}")


def _at(name: str, function, *args):
    """Calls a function; its ConfigErrors are seen from one level up."""
    try:
        return function(*args)
    except ConfigError as error:
        raise error.within(name) from None


# ------------------------------------------------------------------------------ data -> value


def _converter_for(classes: Mapping[str, type]) -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=False)
    for scalar in SCALARS:
        converter.register_structure_hook(scalar, _scalar)
    converter.register_structure_hook_func(
        lambda kind: typing.get_origin(kind) is Literal, _literal
    )
    converter.register_structure_hook_func(_is_tuple, functools.partial(_tuple, converter))
    converter.register_structure_hook_func(is_union, functools.partial(_union, converter, classes))
    converter.register_structure_hook_func(
        dataclasses.is_dataclass, functools.partial(_dataclass, converter, classes)
    )
    return converter


def structure(data: Any, kind: Any) -> Any:
    """JSON data as a value of a declared type, jaxpt's own classes alone. Raises ConfigError."""
    return _converter_for({}).structure(data, kind)


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def describe(kind: Any) -> str:
    """A declared type in words: what is valid."""
    if kind is type(None):
        return "none"
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if is_union(kind):
        return " or ".join(describe(k) for k in typing.get_args(kind))
    if _is_tuple(kind):
        inner = typing.get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return f"a tuple of {describe(inner[0])}"
        return f"({', '.join(describe(k) for k in inner)})"
    plain = {int: "int", float: "float", str: "str", bool: "true or false"}
    return plain.get(kind, getattr(kind, "__name__", str(kind)))


def _short(data: Any) -> str:
    if isinstance(data, dict) and isinstance(data.get("type"), str):
        data = data["type"].rpartition(":")[2]
        return data if len(data) <= 60 else data[:57] + "..."
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."


def _wrong(data: Any, kind: Any) -> ConfigError:
    return ConfigError("", f"{_short(data)} is not valid; it must be {describe(kind)}")


def _scalar(data: Any, kind: Any) -> Any:
    allowed = (float, int) if kind is float else kind
    if not isinstance(data, allowed) or (isinstance(data, bool) and kind is not bool):
        raise _wrong(data, kind)
    if isinstance(data, float) and not math.isfinite(data):
        raise _wrong(data, kind)
    return data


def _literal(data: Any, kind: Any) -> Any:
    for choice in typing.get_args(kind):
        if type(choice) is type(data) and choice == data:
            return choice
    raise _wrong(data, kind)


def _tuple(converter: cattrs.Converter, data: Any, kind: Any) -> tuple:
    inner = typing.get_args(kind)
    if not isinstance(data, list):
        raise _wrong(data, kind)
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = (inner[0],) * len(data)
    if len(inner) != len(data):
        raise ConfigError(
            "", f"has {len(data)} elements; it must have {len(inner)}: {describe(kind)}"
        )
    return tuple(
        _at(str(i), converter.structure, d, k)
        for i, (d, k) in enumerate(zip(data, inner, strict=True))
    )


def _union(converter: cattrs.Converter, classes: Mapping[str, type], data: Any, kind: Any) -> Any:
    """Tries the members; a dataclass is picked by its tag, so that its own errors are kept."""
    members = typing.get_args(kind)
    if isinstance(data, dict):
        cls = class_of(data.get("type"), classes)
        fitting = [k for k in members if isinstance(k, type) and issubclass(cls, k)]
        if not fitting:
            raise _wrong(data, kind)
        return converter.structure(data, fitting[0])
    failed = []
    for member in members:
        try:
            return converter.structure(data, member)
        except ConfigError as error:
            failed.append(error)
    deepest = max(failed, key=lambda error: len(error.field))
    raise deepest if deepest.field else _wrong(data, kind)


def _dataclass(
    converter: cattrs.Converter, classes: Mapping[str, type], data: Any, kind: Any
) -> Any:
    if not isinstance(data, dict):
        raise _wrong(data, kind)
    if "type" not in data:
        raise ConfigError(
            "type", f"missing; it must name {describe(kind)} or a class derived from it"
        )
    cls = class_of(data["type"], classes)
    if not issubclass(cls, kind):
        raise ConfigError(
            "", f"{cls.__name__} is not valid; it must be {describe(kind)}, or derive from it"
        )
    hints = tree.field_types(cls)
    for name in data:
        if name not in hints and name != "type":
            raise tree.no_field(name, hints)
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in data:
            raise ConfigError(name, f"missing; {cls.__name__} needs {describe(hints[name])} here")
    values = {
        n: _at(n, converter.structure, data[n], kind) for n, kind in hints.items() if n in data
    }
    return cls(**values)
