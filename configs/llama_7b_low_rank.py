"""LLaMA 7B with low-rank matrices.

    jaxpt train configs/llama_7b_low_rank.py --workdir runs/llama_7b_low_rank

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import low_rank

run = low_rank("7b")
