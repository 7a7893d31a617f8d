"""A decoder four times as wide as the one that its learning rate was found on, by muP.

    jaxpt train configs/mup_tiny.py
    jaxpt train configs/mup_tiny.py --model.width 64 --model.attention.heads 2 --steps 100

The second is the base model itself, for trying learning rates and standard deviations: what is best
there is near the best at any width, the heads' number growing with it.

Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter
Transfer".
"""

from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import BPE
from jaxpt.duration import share
from jaxpt.evaluation import Evaluate
from jaxpt.models.attention import Attention
from jaxpt.models.mup import MuP, Shapes
from jaxpt.objectives.causal import CausalLM
from jaxpt.optimizers import AdamW, WarmupStableDecay
from jaxpt.run import Phase, Run
from jaxpt.weights.init import Constant

run = Run(
    model=MuP(
        base=Shapes(width=64, heads=2),
        layers=3,
        width=256,
        attention=Attention(heads=8),
        # Nothing at first comes of the output's noise, which is less the wider the model (D.2).
        inits=(("lm_head/w", Constant(0.0)),),
    ),
    tokenizer=BPE(vocab_size=4096),
    phases=(
        Phase(
            steps=400,
            data=Corpus(),
            objective=CausalLM(),
            optimizer=AdamW(
                lr=4e-3, schedule=WarmupStableDecay(warmup=share(0.05), decay=share(0.3))
            ),
            batch=8,
            length=256,
        ),
    ),
    evaluate=Evaluate(every=200, batches=8),
)
