"""LLaMA 60M with sparse-plus-low-rank matrices (SLTrain).

    jaxpt train configs/llama_60m_sltrain.py --workdir runs/llama_60m_sltrain

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import sltrain

run = sltrain("60m")
