"""LLaMA 130M by GaLore.

    jaxpt train configs/llama_130m_galore.py --workdir runs/llama_130m_galore

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import galore

run = galore("130m")
