"""LLaMA 350M by GaLore.

    jaxpt train configs/llama_350m_galore.py --workdir runs/llama_350m_galore

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import galore

run = galore("350m")
