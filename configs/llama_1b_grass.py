"""LLaMA 1B by Grass.

    jaxpt train configs/llama_1b_grass.py --workdir runs/llama_1b_grass

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import grass

run = grass("1b")
