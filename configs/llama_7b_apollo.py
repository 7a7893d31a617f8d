"""LLaMA 7B by APOLLO.

    jaxpt train configs/llama_7b_apollo.py --workdir runs/llama_7b_apollo

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import apollo

run = apollo("7b")
