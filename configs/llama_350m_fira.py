"""LLaMA 350M by Fira.

    jaxpt train configs/llama_350m_fira.py --workdir runs/llama_350m_fira

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import fira

run = fira("350m")
