"""LLaMA 60M by APOLLO.

    jaxpt train configs/llama_60m_apollo.py --workdir runs/llama_60m_apollo

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import apollo

run = apollo("60m")
