"""LLaMA 350M by APOLLO-mini.

    jaxpt train configs/llama_350m_apollo_mini.py --workdir runs/llama_350m_apollo_mini

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import apollo_mini

run = apollo_mini("350m")
