"""The families that are known, by ``model_type``. Order matters where a model could be several: it
is exported as the first that has it."""

from __future__ import annotations

from jaxpt.interop.families.bert import Bert, Roberta
from jaxpt.interop.families.falcon import Falcon
from jaxpt.interop.families.gpt2 import GPT2
from jaxpt.interop.families.llama import Llama, Mistral
from jaxpt.interop.families.modernbert import ModernBert
from jaxpt.interop.families.olmo2 import Olmo2
from jaxpt.interop.families.opt import OPT
from jaxpt.interop.families.phi3 import Phi3
from jaxpt.interop.families.qwen import Qwen2, Qwen3
from jaxpt.interop.families.t5 import MT5, T5, UMT5
from jaxpt.interop.family import Family

DECODERS = (Llama(), Mistral(), Qwen2(), Qwen3(), Olmo2(), Phi3(), GPT2(), OPT(), Falcon())
OTHERS = (T5(), MT5(), UMT5(), Bert(), Roberta(), ModernBert())
FAMILIES: dict[str, Family] = {family.model_type: family for family in (*OTHERS, *DECODERS)}
