"""Masked LM, then a head: an encoder that learns to tell which of two sentences comes first.

    jaxpt train configs/finetune_tiny.py

Sentence order: Lan et al. 2020, "ALBERT: A Lite BERT for Self-supervised Learning of Language
Representations", section 3.1. The head's parameters are fresh, all others go on. For GLUE, take
``data=Task("glue/mrpc", form="classes")`` of ``jaxpt.data.tasks``.
"""

from jaxpt.data.corpus import Corpus
from jaxpt.data.packages import Packages
from jaxpt.data.tokenizers import BPE
from jaxpt.duration import share
from jaxpt.evaluation import Evaluate
from jaxpt.growth.keep import Keep
from jaxpt.models.attention import Attention
from jaxpt.models.headed import headed
from jaxpt.models.mlp import MLP
from jaxpt.models.transformer import Transformer
from jaxpt.objectives.classification import SequenceClassification
from jaxpt.objectives.masked import MaskedLM
from jaxpt.optimizers import AdamW, Linear
from jaxpt.run import Phase, Run

corpus = Corpus(holdout=0.2)  # the model never reads what the head is judged on
model = Transformer(
    kind="encoder",
    layers=3,
    width=128,
    attention=Attention(heads=2),
    mlp=MLP(activation="gelu"),
    tied=True,
    head_transform=True,
    output_bias=True,
)

run = Run(
    model=model,
    tokenizer=BPE(vocab_size=4096),
    phases=(
        Phase(
            name="pretrain",
            steps=300,
            data=corpus,
            objective=MaskedLM(),
            optimizer=AdamW(lr=2e-3, schedule=Linear(warmup=share(0.1))),
            batch=16,
            length=128,
        ),
        Phase(
            name="finetune",
            steps=300,
            model=headed(model, classes=6),
            begin=(Keep(fresh=("head*",)),),
            keep_optimizer=False,
            data=Packages(corpus=corpus),
            objective=SequenceClassification(classes=6),
            optimizer=AdamW(lr=1e-3, schedule=Linear(warmup=share(0.1))),
            batch=16,
            length=128,
        ),
    ),
    evaluate=Evaluate(every=200, batches=8),
)
