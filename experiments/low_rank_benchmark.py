"""Low-rank and memory-efficient pretraining side by side, at a size for two CPU cores.

    python -m experiments.low_rank_benchmark [--quick | --smoke] [--workdir DIR]

Han et al. 2024 (SLTrain), table 2, LLaMA 60M on 1.1 billion tokens of C4, validation perplexity:
full rank 34.06, SLTrain 34.15, GaLore 34.88, ReLoRA 37.04, low rank 78.18; that is 3.528, 3.531,
3.552, 3.612 and 4.359 nats. The rule below asks for that order: for what is close there to be
within 0.05 nats, for ReLoRA to be worse than GaLore, and low rank to be worse than ReLoRA by more
than 0.1.

Each arm's learning rate is the best of three, spaced by about three, in one run of full length on
other data: on a third of the steps some arms do best at rates at which they diverge later. Beside
the claim the grouped support (one entry of every 32, this project's default) is held against the
published one of independent places.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from experiments.study import Arm, Half, Size, Study, main
from experiments.verdicts import Relation, Relations
from jaxpt.checkpoint import Checkpoint
from jaxpt.data.tokenizers import BPE, Bytes
from jaxpt.duration import share
from jaxpt.evaluation import Evaluate
from jaxpt.growth import ReLoRA
from jaxpt.mesh import Mesh
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.models.presets import llama_60m
from jaxpt.monitor import Monitor
from jaxpt.objectives import CausalLM
from jaxpt.optimizers import APOLLO, LORO, SPAM, AdamW, Cosine, Fira, GaLore, Grass, Restarts
from jaxpt.run import Phase, Run
from jaxpt.weights import Dense, Grouped, LoRA, LowRank, SparsePlusLowRank, Uniform, Weight

RANK = 64  # a quarter of the width, as 128 is of LLaMA 60M's 512
PERIOD = 25  # steps between subspaces (the papers: 200 of 10,000)
SCHEDULE = Cosine(warmup=share(0.1), final=0.1)
PLAIN = (3e-3, 1e-2, 1e-3)  # learning rates of Adam on what it is given
PROJECTED = (1e-2, 3e-2, 3e-3)  # and of Adam in subspaces, whose directions are scaled down

BASE = Run(
    model=dataclasses.replace(
        llama_60m(),
        width=256,
        layers=4,
        attention=Attention(heads=4),
        mlp=MLP(width=688, activation="silu", gated=True),
        # By fan-in. LLaMA's 0.02 is meant for widths whose root it is near: at 256 full rank hardly
        # moves in 130 steps (5.47 nats, against 4.25).
        inits=(),
    ),
    tokenizer=BPE(vocab_size=1024),
    phases=(
        Phase(
            steps=250,
            data=Half(),
            objective=CausalLM(),
            optimizer=AdamW(lr=3e-3, schedule=SCHEDULE, weight_decay=0.0, b2=0.999, clip=1.0),
            batch=2,
            length=256,
        ),
    ),
    evaluate=Evaluate(every=share(0.25), batches=32, samples=0),
    checkpoint=Checkpoint(keep=1),
    monitor=Monitor(console="off", tensorboard=False),
    mesh=Mesh(devices=1),
)


def weights(inner: Weight) -> dict[str, Any]:
    """All matrices of the layers held so; embedding and output are dense, as in the papers."""
    return {"model.weights": (("*/attention/*", inner), ("*/mlp/*", inner), ("*", Dense()))}


def optimizer(kind: type, **options: Any) -> dict[str, Any]:
    return {"optimizer": kind(schedule=SCHEDULE, clip=1.0, rank=RANK, period=PERIOD, **options)}


def relora(run: Run) -> dict[str, Any]:
    """Four cycles, as the paper's 5,000 of 20,000 steps; without its warm start of full rank, whose
    memory would be that of full rank."""
    every = max(2, (run.phases[0].total_steps or 0) // 4)
    schedule = Restarts(SCHEDULE, every=every, warmup=max(1, every // 10))
    return {
        **weights(LoRA(RANK, 16.0)),
        "optimizer.schedule": schedule,
        "updates": (ReLoRA(every=every),),
    }


LORO_OFTEN = LORO(schedule=SCHEDULE, clip=1.0, period=PERIOD)
# Moments for a quarter of the entries, as in the paper; resets as rare as 500 steps in 2,000 are.
SPAM_QUARTER = SPAM(schedule=SCHEDULE, clip=1.0, density=0.25, period=100, warmup=30)

# Of the full size, whose time has no room for more.
PAPERS = ("full", "low_rank", "sltrain", "sltrain_uniform", "relora", "galore", "fira", "apollo")
ARMS = (
    Arm("full", values=PLAIN),
    Arm("low_rank", weights(LowRank(RANK)), PLAIN),
    Arm("sltrain", weights(SparsePlusLowRank(RANK, 16.0, Grouped(32))), PLAIN),
    # At the rate that "sltrain" has chosen: nothing but the support is to differ. (Its own choice
    # was 1e-2, better by 0.05 nats in the one run, at which one seed of three then diverged.)
    Arm("sltrain_uniform", weights(SparsePlusLowRank(RANK, 16.0, Uniform(1 / 32)))),
    Arm("relora", relora, PLAIN),
    Arm("galore", optimizer(GaLore), PROJECTED),
    Arm("fira", optimizer(Fira), PROJECTED),
    Arm("apollo", optimizer(APOLLO), PROJECTED),
    Arm("grass", optimizer(Grass), PROJECTED),
    Arm("loro", weights(LowRank(RANK)) | {"optimizer": LORO_OFTEN}, PLAIN),
    Arm("spam", {"optimizer": SPAM_QUARTER}, PLAIN),
)

STUDY = Study(
    name="low_rank_benchmark",
    title="Low-rank and memory-efficient pretraining",
    claim=(
        "Full rank <= SLTrain ~ GaLore < ReLoRA << low rank in validation loss "
        "(Han et al. 2024, table 2)"
    ),
    scaled=(
        "LLaMA of 4 layers, width 256, rank 64, on the source of Python's standard library in "
        "1,024 pieces, in place of LLaMA 60M (8 layers, width 512, rank 128) on C4: what two CPU "
        "cores do in an hour. Matrices are drawn by fan-in, in place of 0.02."
    ),
    base=BASE,
    arms=ARMS,
    rule=Relations(
        Relation("full", "<=", "sltrain"),
        Relation("sltrain", "~", "galore", 0.05),
        Relation("sltrain", "<", "relora"),
        Relation("galore", "<", "relora"),
        Relation("relora", "<", "low_rank", 0.1),
        also=(Relation("sltrain", "~", "sltrain_uniform", 0.05),),
    ),
    sizes={
        "full": Size(
            {},
            tuning={"evaluate.every": None, "data": Half(half="tuning")},
            arms=PAPERS,
        ),
        "quick": Size({"steps": 60, "evaluate.batches": 8}, seeds=(0,)),
        "smoke": Size(
            {
                "tokenizer": Bytes(),
                "steps": 2,
                "batch": 2,
                "length": 16,
                "model.width": 32,
                "model.layers": 1,
                "model.mlp.width": 48,
                "evaluate.batches": 1,
                "evaluate.every": None,
            },
            seeds=(0,),
            arms=("full", "sltrain"),
        ),
    },
    tuned="optimizer.lr",
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
