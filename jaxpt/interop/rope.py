"""Rotary positions in config.json: ``rope_theta`` and ``rope_scaling``, and since transformers 5
``rope_parameters``, which holds both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxpt.errors import ConfigError
from jaxpt.interop.fields import Fields
from jaxpt.models.position import Rotary
from jaxpt.models.scaling import (
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    RotaryScaling,
    YaRN,
)

NONE = type(None)


def rotary(
    fields: Fields,
    *,
    max_length: int,
    partial: bool = False,
    original_length: int | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Rotary:
    """The positions that a config.json asks for.

    Args:
      max_length: its max_position_embeddings, on which some scalings depend.
      partial: whether the family's attention leaves channels as they are where
        ``partial_rotary_factor`` says so.
      original_length: of a family that has it as a field of its own; it comes first.
      kinds: what the family takes some names of scalings for.

    Raises:
      ConfigError: a scaling that is unknown, or one of its fields.
    """
    scaling = fields.get("rope_scaling", None, (dict, NONE))
    parameters = fields.get("rope_parameters", None, (dict, NONE))
    name = "rope_scaling" if scaling else "rope_parameters"
    if scaling and parameters and scaling != parameters:
        raise ConfigError("rope_scaling", "differs from rope_parameters; give one of them")
    inner = Fields(scaling or parameters or {})
    base = fields.get("rope_theta", 10000.0)
    fraction = fields.get("partial_rotary_factor", 1.0)
    try:
        base = inner.get("rope_theta", base, float)
        fraction = inner.get("partial_rotary_factor", fraction, float)
        found = _scaling(inner, max_length, original_length, kinds or {})
        inner.finish({})
    except ConfigError as error:
        raise error.within(name) from None
    if fraction != 1 and not partial:
        raise ConfigError("partial_rotary_factor", f"{fraction} is not supported; only 1 is")
    return Rotary(base=float(base), fraction=float(fraction), scaling=found)


def _scaling(
    inner: Fields, max_length: int, original_length: int | None, kinds: Mapping[str, str]
) -> RotaryScaling | None:
    old = inner.get("type", None, (str, NONE))
    kind = inner.get("rope_type", old or "default", str)
    kind = kinds.get(kind, kind)
    makers = {
        "default": None,
        "linear": lambda: LinearScaling(inner.get("factor", kind=float)),
        "dynamic": lambda: DynamicNTK(inner.get("factor", kind=float), max_length),
        "llama3": lambda: _llama3(inner, length()),
        "yarn": lambda: _yarn(inner, length(), max_length),
        "longrope": lambda: _longrope(inner, length(), max_length),
    }

    def length() -> int:
        inside = inner.get("original_max_position_embeddings", None, (int, NONE))
        return original_length or inside or max_length

    if kind not in makers:
        raise ConfigError("rope_type", f"{kind!r} is not supported; known: {', '.join(makers)}")
    make = makers[kind]
    return make and make()


def _llama3(inner: Fields, length: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=inner.get("factor", kind=float),
        low_frequency_factor=inner.get("low_freq_factor", kind=float),
        high_frequency_factor=inner.get("high_freq_factor", kind=float),
        original_length=length,
    )


def _yarn(inner: Fields, length: int, max_length: int) -> YaRN:
    factor = inner.get("factor", None, (float, NONE)) or max_length / length
    given = inner.get("attention_factor", None, (float, NONE))
    one = inner.get("mscale", None, (float, NONE))
    all_dims = inner.get("mscale_all_dim", None, (float, NONE))
    if given is None and one and all_dims:
        grown = 0.1 * math.log(factor)
        given = (one * grown + 1) / (all_dims * grown + 1)
    return YaRN(
        factor=factor,
        original_length=length,
        attention_factor=given,
        beta_fast=inner.get("beta_fast", None, (float, NONE)) or 32.0,
        beta_slow=inner.get("beta_slow", None, (float, NONE)) or 1.0,
        truncate=inner.get("truncate", True),
    )


def _longrope(inner: Fields, length: int, max_length: int) -> LongRoPE:
    factor = inner.get("factor", None, (float, NONE))
    given = inner.get("attention_factor", None, (float, NONE))
    if given is None and factor is not None:
        given = math.sqrt(1 + math.log(max(factor, 1)) / math.log(length))
    return LongRoPE(
        short=tuple(inner.get("short_factor", kind=list)),
        long=tuple(inner.get("long_factor", kind=list)),
        original_length=length,
        length=max(max_length, length),
        attention_factor=given,
    )


def rotary_fields(positions: Rotary) -> dict[str, Any]:
    """The fields of config.json that ``rotary`` reads, in the form that all versions read; of
    ``max_position_embeddings`` what is known: how far a scaled model reaches."""
    found: dict[str, Any] = {"rope_theta": positions.base, "rope_scaling": None}
    if positions.fraction != 1:
        found["partial_rotary_factor"] = positions.fraction
    scaling, reach = positions.scaling, None
    written: dict[str, Any] = {}
    match scaling:
        case LinearScaling():
            written = {"rope_type": "linear", "factor": scaling.factor}
        case DynamicNTK():
            written = {"rope_type": "dynamic", "factor": scaling.factor}
            reach = scaling.original_length
        case Llama3Scaling():
            written = {"rope_type": "llama3", "factor": scaling.factor}
            reach = scaling.factor * scaling.original_length
            written["low_freq_factor"] = scaling.low_frequency_factor
            written["high_freq_factor"] = scaling.high_frequency_factor
        case YaRN():
            written = {"rope_type": "yarn", "factor": scaling.factor}
            reach = scaling.factor * scaling.original_length
            written |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            written["truncate"] = scaling.truncate
        case LongRoPE():
            written = {"rope_type": "longrope"}
            written |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
            reach = scaling.length
    if written:
        found["rope_scaling"] = written
    if isinstance(scaling, YaRN | LongRoPE) and scaling.attention_factor is not None:
        written["attention_factor"] = scaling.attention_factor
    if isinstance(scaling, Llama3Scaling | YaRN | LongRoPE):
        written["original_max_position_embeddings"] = scaling.original_length
    if reach is not None:
        found["max_position_embeddings"] = round(reach)
    return found
