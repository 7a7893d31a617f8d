"""LLaMA 1B by low-rank updates that restart (ReLoRA).

    jaxpt train configs/llama_1b_relora.py --workdir runs/llama_1b_relora

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import relora

run = relora("1b")
