"""LLaMA 1B by APOLLO.

    jaxpt train configs/llama_1b_apollo.py --workdir runs/llama_1b_apollo

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import apollo

run = apollo("1b")
