"""LLaMA 1B at full rank, by Adam.

    jaxpt train configs/llama_1b_full.py --workdir runs/llama_1b_full

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import full

run = full("1b")
