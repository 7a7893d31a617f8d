"""UL2 20B, an encoder-decoder: seven denoisers of up to 512 inputs and 512 targets, 512 chips.

    jaxpt plan configs/ul2_20b.py --topology v5p:8x8x8
    jaxpt train configs/ul2_20b.py --workdir runs/ul2_20b

Tay et al. 2022, section 5.1: 1024 rows a step, two million steps (a trillion tokens), Adafactor
with a reciprocal square root. Put your data in place of the embedded corpus: Tfds("c4/en:3.0.1") is
the paper's.
"""

import dataclasses

from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import BPE
from jaxpt.evaluation import Evaluate
from jaxpt.mesh import Mesh
from jaxpt.models import presets
from jaxpt.objectives.bounded import Bounded
from jaxpt.objectives.ul2 import UL2
from jaxpt.optimizers import Adafactor, ReciprocalSqrt
from jaxpt.run import Phase, Run

run = Run(
    model=dataclasses.replace(presets.ul2_20b(), remat="full"),
    tokenizer=BPE(vocab_size=32_128, sentinels=128),
    phases=(
        Phase(
            steps=2_000_000,
            data=Corpus(),
            objective=Bounded(UL2(), inputs=512, targets=512),
            optimizer=Adafactor(lr=1e-2, schedule=ReciprocalSqrt(warmup=10_000)),
            batch=1024,
            length=512,
            target_length=512,
        ),
    ),
    mesh=Mesh(data=-1, fsdp=64),
    evaluate=Evaluate(every=10_000, batches=8),
)
