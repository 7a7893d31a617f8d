"""LLaMA 7B by SLTrain with 8-bit moments, layer by layer.

    jaxpt train configs/llama_7b_sltrain_8bit.py --workdir runs/llama_7b_sltrain_8bit

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import sltrain_8bit

run = sltrain_8bit("7b")
