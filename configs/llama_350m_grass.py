"""LLaMA 350M by Grass.

    jaxpt train configs/llama_350m_grass.py --workdir runs/llama_350m_grass

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import grass

run = grass("350m")
