"""State -> state transforms: between phases (``Transition``) or inside the step (``Update``)."""

from jaxpt.growth.average import Average
from jaxpt.growth.base import Transition, Update
from jaxpt.growth.convert import Convert
from jaxpt.growth.frobenius import FrobeniusDecay
from jaxpt.growth.keep import Keep
from jaxpt.growth.refactorise import Refactorise
from jaxpt.growth.relora import ReLoRA, Restart
from jaxpt.growth.reset import Reset
from jaxpt.growth.reset_moments import ResetMoments
from jaxpt.growth.stack import Stack
from jaxpt.growth.vocabulary import ResizeVocabulary

__all__ = [
    "Average",
    "Convert",
    "FrobeniusDecay",
    "Keep",
    "ReLoRA",
    "Refactorise",
    "Reset",
    "ResetMoments",
    "ResizeVocabulary",
    "Restart",
    "Stack",
    "Transition",
    "Update",
]
