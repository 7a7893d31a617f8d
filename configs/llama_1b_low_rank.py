"""LLaMA 1B with low-rank matrices.

    jaxpt train configs/llama_1b_low_rank.py --workdir runs/llama_1b_low_rank

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import low_rank

run = low_rank("1b")
