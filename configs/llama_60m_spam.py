"""LLaMA 60M by SPAM.

    jaxpt train configs/llama_60m_spam.py --workdir runs/llama_60m_spam

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import spam

run = spam("60m")
