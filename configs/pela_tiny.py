"""A trained model cut to two fifths of its matrices' numbers, which learns from what it was (PELA).

    jaxpt train configs/pela_tiny.py

Guo et al. 2024, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation": a dense
model is trained; truncated singular value decompositions of its matrices learn from it; the
factorised model goes on alone. On the embedded corpus, some minutes on two CPU cores. Lengths and
learning rates are ours.
"""

import dataclasses

from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import BPE
from jaxpt.duration import share
from jaxpt.evaluation import Evaluate
from jaxpt.growth import Convert, Keep
from jaxpt.models.attention import Attention
from jaxpt.models.distilled import Distilled
from jaxpt.models.transformer import Transformer
from jaxpt.objectives import PELA, CausalLM
from jaxpt.optimizers import AdamW, Cosine
from jaxpt.run import Phase, Run
from jaxpt.weights import Dense, LowRank

dense = Transformer(width=128, layers=4, attention=Attention(heads=4))
cut = LowRank(rank=0.4)
low_rank = dataclasses.replace(
    dense, weights=(("*/attention/*", cut), ("*/mlp/*", cut), ("*", Dense()))
)

first = Phase(
    name="dense",
    steps=600,
    data=Corpus(),
    objective=CausalLM(),
    optimizer=AdamW(lr=2e-3, schedule=Cosine(warmup=share(0.05))),
    batch=32,
    length=128,
)
distil = dataclasses.replace(
    first,
    name="pela",
    steps=300,
    model=Distilled(student=low_rank, teacher=dense),
    begin=(Convert(),),
    objective=PELA(CausalLM()),
    optimizer=AdamW(lr=1e-3, schedule=Cosine(warmup=share(0.05))),
    keep_optimizer=False,
)
alone = dataclasses.replace(
    first,
    name="alone",
    steps=100,
    model=low_rank,
    begin=(Keep("student"),),
    optimizer=AdamW(lr=3e-4, schedule=Cosine()),
    keep_optimizer=False,
)

run = Run(
    model=dense,
    tokenizer=BPE(vocab_size=4096),
    phases=(first, distil, alone),
    evaluate=Evaluate(every=100, batches=8),
)
