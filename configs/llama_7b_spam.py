"""LLaMA 7B by SPAM.

    jaxpt train configs/llama_7b_spam.py --workdir runs/llama_7b_spam

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import spam

run = spam("7b")
