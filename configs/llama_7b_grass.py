"""LLaMA 7B by Grass.

    jaxpt train configs/llama_7b_grass.py --workdir runs/llama_7b_grass

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import grass

run = grass("7b")
