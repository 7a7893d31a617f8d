"""The families that are known, by ``model_type``. Order matters where a model could be several: it
is exported as the first that has it."""

from __future__ import annotations

from jaxpt.interop.families.t5 import T5
from jaxpt.interop.family import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (T5(),)}
