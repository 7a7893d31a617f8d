"""LLaMA 1B by Fira.

    jaxpt train configs/llama_1b_fira.py --workdir runs/llama_1b_fira

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import fira

run = fira("1b")
