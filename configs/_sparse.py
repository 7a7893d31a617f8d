"""What the configs of sparse pretraining have in common: a small decoder on the embedded corpus,
minutes on two CPU cores. Sizes and learning rates are ours; shares and periods are the papers', at
this length.

The matrices of attention and feed-forward layers are sparse; embedding, norms and the output
projection are dense.
"""

from __future__ import annotations

from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import BPE
from jaxpt.duration import share
from jaxpt.evaluation import Evaluate
from jaxpt.growth import Update
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.models.transformer import Transformer
from jaxpt.objectives import CausalLM
from jaxpt.optimizers import AdamW, Cosine, Group
from jaxpt.run import Phase, Run
from jaxpt.weights import Dense, Weight

DENSE = Dense()


def model(weight: Weight = DENSE, channels: int = 384) -> Transformer:
    """The decoder, with this weight for the matrices of its layers."""
    return Transformer(
        width=128,
        layers=4,
        attention=Attention(heads=4),
        mlp=MLP(width=channels, activation="silu", gated=True),
        weights=(("*/attention/*", weight), ("*/mlp/*", weight), ("*", DENSE)),
    )


def phase(
    *updates: Update, name: str = "train", steps: int = 600, groups: tuple[Group, ...] = ()
) -> Phase:
    return Phase(
        name=name,
        steps=steps,
        data=Corpus(),
        objective=CausalLM(),
        optimizer=AdamW(lr=2e-3, schedule=Cosine(warmup=share(0.05)), groups=groups),
        batch=32,
        length=128,
        updates=updates,
    )


def pretraining(weight: Weight, *phases: Phase) -> Run:
    return Run(
        model=model(weight),
        tokenizer=BPE(vocab_size=4096),
        phases=phases,
        evaluate=Evaluate(every=100, batches=8),
    )
