"""LLaMA 7B with low-rank matrices, by LORO.

    jaxpt train configs/llama_7b_loro.py --workdir runs/llama_7b_loro

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import loro

run = loro("7b")
