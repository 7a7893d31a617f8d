"""LLaMA 60M by GaLore.

    jaxpt train configs/llama_60m_galore.py --workdir runs/llama_60m_galore

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import galore

run = galore("60m")
