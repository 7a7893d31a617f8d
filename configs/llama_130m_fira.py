"""LLaMA 130M by Fira.

    jaxpt train configs/llama_130m_fira.py --workdir runs/llama_130m_fira

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import fira

run = fira("130m")
