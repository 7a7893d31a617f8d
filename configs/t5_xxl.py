"""T5 1.1 XXL (11 billion parameters): span corruption of rows of 512 tokens, 128 chips.

    jaxpt plan configs/t5_xxl.py --topology v5p:4x4x8
    jaxpt train configs/t5_xxl.py --workdir runs/t5_xxl

Raffel et al. 2020, sections 2.1 and 3.7: 2048 rows a step, of 512 inputs and 114 targets, a million
steps, Adafactor with a reciprocal square root. Put your data in place of the embedded corpus:
Tfds("c4/en:3.0.1") is the paper's.
"""

import dataclasses

from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import BPE
from jaxpt.evaluation import Evaluate
from jaxpt.mesh import Mesh
from jaxpt.models import presets
from jaxpt.objectives.span_corruption import SpanCorruption
from jaxpt.optimizers import Adafactor, ReciprocalSqrt
from jaxpt.run import Phase, Run

run = Run(
    model=dataclasses.replace(presets.t5_xxl(), remat="full"),
    tokenizer=BPE(vocab_size=32_128),
    phases=(
        Phase(
            steps=1_000_000,
            data=Corpus(),
            objective=SpanCorruption(),
            optimizer=Adafactor(lr=1e-2, schedule=ReciprocalSqrt(warmup=10_000)),
            batch=2048,
            length=512,
            target_length=114,
        ),
    ),
    mesh=Mesh(data=-1, fsdp=64),
    evaluate=Evaluate(every=10_000, batches=8),
)
