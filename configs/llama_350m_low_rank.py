"""LLaMA 350M with low-rank matrices.

    jaxpt train configs/llama_350m_low_rank.py --workdir runs/llama_350m_low_rank

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import low_rank

run = low_rank("350m")
