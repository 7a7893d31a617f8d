"""LLaMA 7B at full rank, by Adam.

    jaxpt train configs/llama_7b_full.py --workdir runs/llama_7b_full

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import full

run = full("7b")
