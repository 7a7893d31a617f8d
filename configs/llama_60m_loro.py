"""LLaMA 60M with low-rank matrices, by LORO.

    jaxpt train configs/llama_60m_loro.py --workdir runs/llama_60m_loro

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import loro

run = loro("60m")
