"""LLaMA on C4 by every method of the low-rank and memory-efficient pretraining papers: all choices
of ``configs/llama_SIZE_METHOD.py``, which are a line each.

What all have in common (Zhao et al. 2024, "GaLore", section 5.1 and appendix C; Han et al. 2024,
"SLTrain", section 5.1; Glentis et al. 2025): 512 sequences of 256 tokens a step, Adam with
b2 = 0.999 and no weight decay, a linear rise over the first tenth and a cosine to a tenth of the
learning rate, parameters in bfloat16. No clipping, but at 7B a global norm of 1. Published settings
are those of the authors' scripts; "ours" is what no script or paper says.

Optimizer states are float32 here. The authors' are bfloat16 like their parameters, where an average
with b2 = 0.999 hardly moves: 1/1000 of it is below half a unit in its last place.

Hours on one accelerator for 60M, days on eight for 1B. Put your data in place of the embedded
corpus, whose 10 MB are no text for models of this size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import BPE
from jaxpt.duration import share
from jaxpt.evaluation import Evaluate
from jaxpt.growth import Convert, ReLoRA
from jaxpt.layerwise import LayerwiseStep
from jaxpt.models import presets
from jaxpt.models.transformer import Transformer
from jaxpt.objectives import CausalLM
from jaxpt.optimizers import (
    APOLLO,
    LORO,
    SPAM,
    AdamW,
    Constant,
    Cosine,
    Fira,
    GaLore,
    Grass,
    Optimizer,
    Restarts,
    StableSPAM,
)
from jaxpt.run import Phase, Run
from jaxpt.weights import Dense, Grouped, LoRA, LowRank, Rows, SparsePlusLowRank, Weight

DATA = Corpus()  # the papers': Tfds("c4/en:3.0.1"), from jaxpt.data.tfds

Name = Literal["60m", "130m", "350m", "1b", "7b"]


@dataclasses.dataclass(frozen=True)
class Size:
    """What depends on the model's size alone."""

    model: Callable[[], Transformer]
    steps: int  # 1.3, 2.6, 7.8, 13.1 and 19.7 billion tokens
    rank: int  # of whatever has a rank, unless the method says otherwise
    lr: float  # of Adam at full rank (ours; Zhao et al. chose among 1e-4 to 1e-2; 7B: LLaMA's own)
    clip: float | None = None


SIZES: dict[Name, Size] = {
    "60m": Size(presets.llama_60m, 10_000, 128, 1e-3),
    "130m": Size(presets.llama_130m, 20_000, 256, 1e-3),
    "350m": Size(presets.llama_350m, 60_000, 256, 1e-3),
    "1b": Size(presets.llama_1b, 100_000, 512, 5e-4),
    "7b": Size(presets.llama_7b, 150_000, 1024, 3e-4, clip=1.0),
}
SCHEDULE = Cosine(warmup=share(0.1), final=0.1)
DENSE = Dense()


def pretraining(name: Name, optimizer: Optimizer, weight: Weight = DENSE) -> Run:
    """The run that all methods have in common.

    Args:
      optimizer: clipping is the size's, whatever it says.
      weight: how the matrices of attention and feed-forward layers are held. Embeddings and the
        output projection are dense.
    """
    size = SIZES[name]
    return Run(
        model=held(name, weight),
        tokenizer=BPE(vocab_size=32_000),
        phases=(
            Phase(
                steps=size.steps,
                data=DATA,
                objective=CausalLM(),
                optimizer=dataclasses.replace(optimizer, clip=size.clip),
                batch=512,
                length=256,
            ),
        ),
        evaluate=Evaluate(every=1_000, batches=8),
    )


def held(name: Name, weight: Weight) -> Transformer:
    weights = (("*/attention/*", weight), ("*/mlp/*", weight), ("*", DENSE))
    return dataclasses.replace(SIZES[name].model(), dtype="bfloat16", weights=weights)


def adam(lr: float) -> AdamW:
    return AdamW(lr, SCHEDULE, weight_decay=0.0, b2=0.999)


# ---------------------------------------------------------------------------- how matrices are held


def full(name: Name) -> Run:
    """Dense matrices, Adam."""
    return pretraining(name, adam(SIZES[name].lr))


def low_rank(name: Name) -> Run:
    """A product of two factors in the place of every matrix (Kamalakara et al. 2022).

    Learning rate: 0.0015 at 60M (Glentis et al.'s script), else that of full rank (ours).
    """
    lr = {"60m": 1.5e-3}.get(name, SIZES[name].lr)
    return pretraining(name, adam(lr), LowRank(SIZES[name].rank, init="spectral"))


def sltrain(name: Name, stored: bool = True) -> Run:
    """A product of two factors plus a sparse matrix (Han et al. 2024, scripts and table 2).

    Density 0.03 (here 1 / 32) and 0.05 at 7B. Their runs are a tenth longer, in which the learning
    rate rises.
    """
    alpha = {"60m": 32.0, "130m": 16.0, "350m": 16.0, "1b": 8.0, "7b": 8.0}[name]
    support = Grouped(20 if name == "7b" else 32, stored)
    return pretraining(name, adam(3e-3), SparsePlusLowRank(SIZES[name].rank, alpha, support))


def sltrain_8bit(name: Name) -> Run:
    """SLTrain with moments in 8 bits and layers updated one by one (Han et al. 2024, section 5.2),
    and a support that is drawn again at every use: the least memory."""
    optimizer = dataclasses.replace(adam(3e-3), clip=SIZES[name].clip, state_dtype="8bit")
    run = sltrain(name, stored=False)
    return run.replace(optimizer=optimizer, step=LayerwiseStep())


def relora(name: Name) -> Run:
    """Low-rank updates of frozen matrices, merged and begun anew (Lialin et al. 2023).

    As their repository has it: a quarter of the steps at full rank, then restarts every quarter,
    with 100 steps in which the learning rate rises, at twice that of full rank, alpha 32.
    """
    size = SIZES[name]
    start, quarter = full(name).phases[0], size.steps // 4
    start = dataclasses.replace(
        start,
        name="full",
        steps=quarter,
        optimizer=dataclasses.replace(start.optimizer, schedule=Constant(warmup=size.steps // 10)),
    )
    schedule = Restarts(Cosine(warmup=500, final=0.1), every=quarter, warmup=100)
    rest = dataclasses.replace(
        start,
        name="relora",
        steps=size.steps - quarter,
        model=held(name, LoRA(size.rank, alpha=32.0)),
        begin=(Convert(),),
        keep_optimizer=False,
        optimizer=dataclasses.replace(adam(2 * size.lr), schedule=schedule, clip=size.clip),
        updates=(ReLoRA(every=quarter, reset="zero"),),
    )
    return dataclasses.replace(full(name), phases=(start, rest))


def loro(name: Name) -> Run:
    """Low rank, its factors updated as one (Mo et al. 2025, scripts; at 7B as at 1B, ours).

    Theirs are drawn by Xavier's rule each, here so that products have a dense matrix's variance.
    """
    lr, period = (5e-3, 200) if name in ("1b", "7b") else (1e-2, 500)
    warmup = 2000 if name == "350m" else share(0.1)
    schedule = Restarts(Cosine(warmup, final=0.1), every=period, warmup=5)
    optimizer = LORO(lr, schedule, period=period)
    return pretraining(name, optimizer, LowRank(SIZES[name].rank, init="plain"))


# ----------------------------------------------------------------- how dense matrices are optimized


def galore(name: Name) -> Run:
    """Adam in a subspace of each gradient (Zhao et al. 2024, scripts; rank at 1B: table 2)."""
    return pretraining(name, GaLore(**projected(name), scale=0.25))


def fira(name: Name) -> Run:
    """GaLore and what it leaves out, scaled (Chen et al. 2024, scripts; at 7B theirs has 10,000
    steps)."""
    scale = 0.0625 if name in ("1b", "7b") else 0.25
    settings = projected(name, rank=64 if name == "7b" else None)
    return pretraining(name, Fira(**settings, scale=scale))


def grass(name: Name) -> Run:
    """Adam for the rows of each gradient that are longest, of which alone gradients are made
    (Muhamed et al. 2024; with GaLore's settings, ours)."""
    optimizer = Grass(**projected(name), scale=0.25)
    return pretraining(name, optimizer, Rows(SIZES[name].rank))


def apollo(name: Name) -> Run:
    """Gradients scaled as Adam would in a random subspace (Zhu et al. 2024, scripts)."""
    rank = {"60m": 128, "130m": 192, "350m": 256, "1b": 256, "7b": 256}[name]
    return pretraining(name, APOLLO(1e-2, SCHEDULE, rank=rank, period=200, eps=1e-6))


def apollo_mini(name: Name) -> Run:
    """APOLLO in one dimension (Zhu et al. 2024, scripts)."""
    optimizer = APOLLO(
        1e-2,
        SCHEDULE,
        rank=1,
        scaling="tensor",
        scale=192.0 if name == "130m" else 128.0,
        period=200,
        eps=1e-6,
    )
    return pretraining(name, optimizer)


def projected(name: Name, rank: int | None = None) -> dict[str, Any]:
    """GaLore's, Fira's and Grass's common settings."""
    lr, period = (5e-3, 500) if name == "7b" else (1e-2, 200)
    rank = rank or SIZES[name].rank
    return {"lr": lr, "schedule": SCHEDULE, "rank": rank, "period": period, "eps": 1e-6}


def spam(name: Name) -> Run:
    """Adam that cuts spikes and begins anew (Huang et al. 2025; scripts for 130M and 350M, the
    others by the paper; at 7B as at 1B, ours)."""
    schedule = Cosine(warmup=1000, final=0.1)
    return pretraining(name, SPAM(SPAM_LR[name], schedule, threshold=5000.0, period=500))


def stable_spam(name: Name) -> Run:
    """Adam on gradients steadied by their history (Huang et al. 2025, the script for 130M in
    bfloat16; learning rates as SPAM's)."""
    optimizer = StableSPAM(SPAM_LR[name], SCHEDULE, gamma1=0.85, gamma2=0.99999, period=1000)
    return pretraining(name, optimizer)


SPAM_LR: dict[Name, float] = {"60m": 1e-3, "130m": 8e-4, "350m": 4e-4, "1b": 2e-4, "7b": 2e-4}
