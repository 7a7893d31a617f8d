"""LLaMA 130M by APOLLO.

    jaxpt train configs/llama_130m_apollo.py --workdir runs/llama_130m_apollo

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import apollo

run = apollo("130m")
