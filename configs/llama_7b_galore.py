"""LLaMA 7B by GaLore.

    jaxpt train configs/llama_7b_galore.py --workdir runs/llama_7b_galore

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import galore

run = galore("7b")
