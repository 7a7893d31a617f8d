"""LLaMA 350M at full rank, by Adam.

    jaxpt train configs/llama_350m_full.py --workdir runs/llama_350m_full

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import full

run = full("350m")
