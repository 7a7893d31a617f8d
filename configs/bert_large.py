"""BERT large's masked language model: 24 layers of width 1024, rows of 512 tokens.

    jaxpt plan configs/bert_large.py --topology v5e:2x4
    jaxpt train configs/bert_large.py --workdir runs/bert_large

Devlin et al. 2019, appendix A.2: 256 rows a step, a million steps, AdamW at 1e-4 with 10,000 steps
of warmup; all rows are of 512 tokens here. Every device has all parameters. Put your data in place
of the embedded corpus.
"""

import dataclasses

from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import BPE
from jaxpt.evaluation import Evaluate
from jaxpt.mesh import Mesh
from jaxpt.models import presets
from jaxpt.objectives.masked import MaskedLM
from jaxpt.optimizers import AdamW, Linear
from jaxpt.run import Phase, Run

run = Run(
    model=dataclasses.replace(presets.bert_large(), remat="full"),
    tokenizer=BPE(vocab_size=30_522),
    phases=(
        Phase(
            steps=1_000_000,
            data=Corpus(),
            objective=MaskedLM(),
            optimizer=AdamW(
                lr=1e-4, schedule=Linear(warmup=10_000), weight_decay=0.01, b2=0.999, eps=1e-6
            ),
            batch=256,
            length=512,
        ),
    ),
    mesh=Mesh(data=-1),
    evaluate=Evaluate(every=10_000, batches=8),
)
