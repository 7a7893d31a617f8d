"""LLaMA 350M by APOLLO.

    jaxpt train configs/llama_350m_apollo.py --workdir runs/llama_350m_apollo

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import apollo

run = apollo("350m")
