"""LLaMA 60M by Fira.

    jaxpt train configs/llama_60m_fira.py --workdir runs/llama_60m_fira

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import fira

run = fira("60m")
