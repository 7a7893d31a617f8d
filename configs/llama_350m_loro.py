"""LLaMA 350M with low-rank matrices, by LORO.

    jaxpt train configs/llama_350m_loro.py --workdir runs/llama_350m_loro

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import loro

run = loro("350m")
