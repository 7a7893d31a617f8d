"""LLaMA 130M with sparse-plus-low-rank matrices (SLTrain).

    jaxpt train configs/llama_130m_sltrain.py --workdir runs/llama_130m_sltrain

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import sltrain

run = sltrain("130m")
