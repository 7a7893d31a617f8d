"""UL2's denoisers with a model of T5 1.1's kind, which Hugging Face has too, for two CPU cores.

    jaxpt train configs/t5_tiny.py
    jaxpt export runs/t5_tiny --to hf runs/t5_tiny_hf

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer"; Tay et al. 2022, "UL2: Unifying Language Learning Paradigms".
"""

from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import BPE
from jaxpt.duration import share
from jaxpt.evaluation import Evaluate
from jaxpt.models import inits
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.models.norm import RMSNorm
from jaxpt.models.position import RelativeBias
from jaxpt.models.transformer import Transformer
from jaxpt.objectives.ul2 import UL2
from jaxpt.optimizers import AdamW, WarmupStableDecay
from jaxpt.run import Phase, Run

run = Run(
    model=Transformer(
        kind="encoder_decoder",
        layers=3,
        width=192,
        attention=Attention(heads=3, scale=1.0),
        mlp=MLP(width=512, activation="gelu_tanh", gated=True),
        norm=RMSNorm(epsilon=1e-6),
        positions=RelativeBias(buckets=32, max_distance=128),
        scan=False,
        inits=inits.t5(head_dim=64),
    ),
    tokenizer=BPE(vocab_size=4096),
    phases=(
        Phase(
            steps=800,
            data=Corpus(),
            objective=UL2(),
            optimizer=AdamW(
                lr=4e-3, schedule=WarmupStableDecay(warmup=share(0.05), decay=share(0.3))
            ),
            batch=8,
            length=256,
            target_length=128,
        ),
    ),
    evaluate=Evaluate(every=200, batches=8),
)
