"""LLaMA 130M by SPAM.

    jaxpt train configs/llama_130m_spam.py --workdir runs/llama_130m_spam

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import spam

run = spam("130m")
