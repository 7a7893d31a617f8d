"""LLaMA 60M by low-rank updates that restart (ReLoRA).

    jaxpt train configs/llama_60m_relora.py --workdir runs/llama_60m_relora

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import relora

run = relora("60m")
