"""LLaMA 350M by low-rank updates that restart (ReLoRA).

    jaxpt train configs/llama_350m_relora.py --workdir runs/llama_350m_relora

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import relora

run = relora("350m")
