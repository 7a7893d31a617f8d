"""LLaMA 1B by GaLore.

    jaxpt train configs/llama_1b_galore.py --workdir runs/llama_1b_galore

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import galore

run = galore("1b")
