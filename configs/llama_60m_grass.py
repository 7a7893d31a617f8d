"""LLaMA 60M by Grass.

    jaxpt train configs/llama_60m_grass.py --workdir runs/llama_60m_grass

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import grass

run = grass("60m")
