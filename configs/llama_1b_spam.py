"""LLaMA 1B by SPAM.

    jaxpt train configs/llama_1b_spam.py --workdir runs/llama_1b_spam

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import spam

run = spam("1b")
