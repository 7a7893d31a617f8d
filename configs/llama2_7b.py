"""LLaMA 7B, which is Llama 2 7B: float32 parameters, bfloat16 products, a row or two a chip.

    jaxpt plan configs/llama2_7b.py --topology v5e:8x8
    jaxpt plan configs/llama2_7b.py --topology h100:8 --batch 16
    jaxpt plan configs/llama2_7b.py --topology v5e:4x4 --batch 16
    jaxpt train configs/llama2_7b.py --workdir runs/llama2_7b

Touvron et al. 2023, section 2.3, for the optimizer; their batch of 4 million tokens is
``--batch 2048 --step.accumulate 32``. Parameters and batch are cut over all chips, and layers are
computed again in the backward pass. Put your data in place of the embedded corpus.
"""

import dataclasses

from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import BPE
from jaxpt.evaluation import Evaluate
from jaxpt.mesh import Mesh
from jaxpt.models import presets
from jaxpt.objectives import CausalLM
from jaxpt.optimizers import AdamW, Cosine
from jaxpt.run import Phase, Run

run = Run(
    model=dataclasses.replace(presets.llama_7b(), remat="full"),
    tokenizer=BPE(vocab_size=32_000),
    phases=(
        Phase(
            steps=250_000,
            data=Corpus(),
            objective=CausalLM(),
            optimizer=AdamW(lr=3e-4, schedule=Cosine(warmup=2_000, final=0.1)),
            batch=64,
            length=2048,
        ),
    ),
    mesh=Mesh(data=1, fsdp=-1),
    evaluate=Evaluate(every=1_000, batches=8),
)
