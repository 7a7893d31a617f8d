"""Objectives: a file each. See ``base.py`` for what one is."""

from jaxpt.objectives.base import Features, Loss, Objective
from jaxpt.objectives.blank_infilling import BlankInfilling
from jaxpt.objectives.bounded import Bounded
from jaxpt.objectives.causal import CausalLM
from jaxpt.objectives.classification import SequenceClassification
from jaxpt.objectives.electra import ReplacedTokens
from jaxpt.objectives.fill_in_the_middle import FillInTheMiddle, Infilling
from jaxpt.objectives.masked import MaskedLM
from jaxpt.objectives.mixture import Mixture, Part
from jaxpt.objectives.on_device import OnDevice
from jaxpt.objectives.pela import PELA
from jaxpt.objectives.prefix import PrefixLM
from jaxpt.objectives.span_answer import SpanAnswer
from jaxpt.objectives.span_corruption import SpanCorruption
from jaxpt.objectives.text_to_text import TextToText
from jaxpt.objectives.token_classification import TokenClassification
from jaxpt.objectives.ul2 import UL2
from jaxpt.objectives.ul2r import UL2R

__all__ = [
    "PELA",
    "UL2",
    "UL2R",
    "BlankInfilling",
    "Bounded",
    "CausalLM",
    "Features",
    "FillInTheMiddle",
    "Infilling",
    "Loss",
    "MaskedLM",
    "Mixture",
    "Objective",
    "OnDevice",
    "Part",
    "PrefixLM",
    "ReplacedTokens",
    "SequenceClassification",
    "SpanAnswer",
    "SpanCorruption",
    "TextToText",
    "TokenClassification",
]
