"""LLaMA 7B with sparse-plus-low-rank matrices (SLTrain).

    jaxpt train configs/llama_7b_sltrain.py --workdir runs/llama_7b_sltrain

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import sltrain

run = sltrain("7b")
