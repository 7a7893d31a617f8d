"""LLaMA 7B by Fira.

    jaxpt train configs/llama_7b_fira.py --workdir runs/llama_7b_fira

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import fira

run = fira("7b")
