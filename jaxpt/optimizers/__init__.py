"""Optimizers, a file each, and learning rate schedules. All are frozen configs over optax."""

from jaxpt.optimizers.adafactor import Adafactor
from jaxpt.optimizers.adamw import AdamW
from jaxpt.optimizers.apollo import APOLLO
from jaxpt.optimizers.base import Group, Optimizer
from jaxpt.optimizers.fira import Fira
from jaxpt.optimizers.galore import GaLore
from jaxpt.optimizers.grass import Grass
from jaxpt.optimizers.lion import Lion
from jaxpt.optimizers.loro import LORO
from jaxpt.optimizers.muon import Muon
from jaxpt.optimizers.schedule_free import ScheduleFree
from jaxpt.optimizers.schedules import (
    Constant,
    Cosine,
    Linear,
    ReciprocalSqrt,
    Restarts,
    Schedule,
    WarmupStableDecay,
)
from jaxpt.optimizers.sgd import SGD
from jaxpt.optimizers.spam import SPAM
from jaxpt.optimizers.stable_spam import StableSPAM

__all__ = [
    "APOLLO",
    "LORO",
    "SGD",
    "SPAM",
    "Adafactor",
    "AdamW",
    "Constant",
    "Cosine",
    "Fira",
    "GaLore",
    "Grass",
    "Group",
    "Linear",
    "Lion",
    "Muon",
    "Optimizer",
    "ReciprocalSqrt",
    "Restarts",
    "Schedule",
    "ScheduleFree",
    "StableSPAM",
    "WarmupStableDecay",
]
