"""LLaMA 130M by Grass.

    jaxpt train configs/llama_130m_grass.py --workdir runs/llama_130m_grass

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import grass

run = grass("130m")
