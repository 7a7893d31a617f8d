"""LLaMA 350M by SPAM.

    jaxpt train configs/llama_350m_spam.py --workdir runs/llama_350m_spam

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import spam

run = spam("350m")
