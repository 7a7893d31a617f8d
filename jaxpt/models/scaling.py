"""How rotary frequencies are changed, so that a model reads further than it was trained to."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from jaxpt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Config of a scaling; subclasses below.

    Some depend on the length of the row: of the tokens that go through the model at once, and in
    decoding, of all that the cache has room for. It is static, so that no token of an example
    depends on how many follow it.
    """

    @property
    def magnitude(self) -> float:
        """Factor of cos and sin, so that scores are scaled by its square."""
        return 1.0

    def check(self, channels: int) -> None:
        """Raises ConfigError where ``channels`` rotated channels of a head do not fit."""

    def scaled(self, frequencies: np.ndarray, base: float, length: int) -> np.ndarray:
        """The changed frequencies, float64 [R/2], for rows of ``length`` positions."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Position interpolation (Chen et al. 2023, eq. 4): every position divided by ``factor``."""

    factor: float = 1.0  # how many times further the model reads

    def __post_init__(self):
        _factor(self.factor)

    def scaled(self, frequencies, base, length):
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicNTK(RotaryScaling):
    """A base that grows with the row's length from ``original_length`` on, so that the slowest
    frequency is interpolated and the fastest is left as it is (bloc97, emozilla 2023; Peng et al.
    2024, section 3.3)."""

    factor: float = 1.0  # how fast the base grows
    original_length: int = 2048  # positions that the model was trained with

    def __post_init__(self):
        _factor(self.factor)
        _length(self.original_length)

    def scaled(self, frequencies, base, length):
        ratio = max(length, self.original_length) / self.original_length
        growth = self.factor * ratio - (self.factor - 1)
        last = max(len(frequencies) - 1, 1)
        return frequencies * growth ** (-np.arange(len(frequencies)) / last)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """LLaMA 3.1's: long wavelengths are interpolated, short ones left, those between mixed."""

    factor: float = 8.0  # how many times further the model reads
    low_frequency_factor: float = 1.0  # wavelengths above original_length / this are interpolated
    high_frequency_factor: float = 4.0  # wavelengths below original_length / this are left
    original_length: int = 8192  # positions that the model was trained with

    def __post_init__(self):
        _factor(self.factor)
        _length(self.original_length)
        if not self.high_frequency_factor > self.low_frequency_factor > 0:
            raise ConfigError(
                "high_frequency_factor",
                f"{self.high_frequency_factor} must be above low_frequency_factor = "
                f"{self.low_frequency_factor}, and both above 0",
            )

    def scaled(self, frequencies, base, length):
        turns = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class YaRN(RotaryScaling):
    """NTK by parts, and a temperature of the scores (Peng et al. 2024, sections 3.2 and 3.4)."""

    factor: float = 1.0  # how many times further the model reads
    original_length: int = 2048  # positions that the model was trained with
    # of cos and sin; None: 0.1 ln(factor) + 1 (eq. 15)
    attention_factor: float | None = None
    beta_fast: float = 32.0  # turns in original_length above which a frequency is left
    beta_slow: float = 1.0  # turns below which it is interpolated
    truncate: bool = True  # whether the channels between begin and end at whole numbers

    def __post_init__(self):
        _factor(self.factor)
        _length(self.original_length)
        _attention_factor(self.attention_factor)
        if not self.beta_fast > self.beta_slow > 0:
            raise ConfigError(
                "beta_fast",
                f"{self.beta_fast} must be above beta_slow = {self.beta_slow}, and both above 0",
            )

    @property
    def magnitude(self) -> float:
        default = 0.1 * math.log(self.factor) + 1
        return default if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies, base, length):
        pairs = len(frequencies)

        def channel(turns: float) -> float:
            return pairs * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # As the authors' code has it: the last of the channels, not of the pairs.
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        ramp = (np.arange(pairs) - low) / (high - low if high != low else 1e-3)
        interpolated = np.clip(ramp, 0, 1)
        return frequencies * (1 - interpolated + interpolated / self.factor)


@dataclasses.dataclass(frozen=True)
class LongRoPE(RotaryScaling):
    """A factor for each frequency, one set for short rows and one for long (Ding et al. 2024)."""

    short: tuple[float, ...] = ()  # divisors of the frequencies up to original_length
    long: tuple[float, ...] = ()  # divisors in rows that are longer
    original_length: int = 4096  # positions that the model was trained with
    length: int = 131072  # positions that it reaches
    # of cos and sin, in all rows; None: sqrt(1 + ln(length / original_length) / ln original_length)
    attention_factor: float | None = None

    def __post_init__(self):
        _length(self.original_length)
        _attention_factor(self.attention_factor)
        if self.length < self.original_length:
            raise ConfigError("length", f"{self.length} is below {self.original_length}")
        for field in ("short", "long"):
            if not all(factor > 0 for factor in getattr(self, field)):
                raise ConfigError(field, "every factor must be above 0")

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        further = math.log(self.length / self.original_length)
        return math.sqrt(1 + further / math.log(self.original_length))

    def check(self, channels: int) -> None:
        for field in ("short", "long"):
            count = len(getattr(self, field))
            if count != channels // 2:
                raise ConfigError(
                    field, f"{count} factors; {channels} rotated channels need {channels // 2}"
                )

    def scaled(self, frequencies, base, length):
        kind: Literal["short", "long"] = "long" if length > self.original_length else "short"
        return frequencies / np.asarray(getattr(self, kind), np.float64)


def _factor(factor: float) -> None:
    if not factor >= 1:
        raise ConfigError("factor", f"{factor} is not valid; give 1 or more")


def _length(length: int) -> None:
    if length < 2:
        raise ConfigError("original_length", f"{length} is not valid; give 2 or more")


def _attention_factor(factor: float | None) -> None:
    if factor is not None and not factor > 0:
        raise ConfigError("attention_factor", f"{factor} is not valid; it must be above 0")
