"""LLaMA 1B by Stable-SPAM.

    jaxpt train configs/llama_1b_stable_spam.py --workdir runs/llama_1b_stable_spam

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import stable_spam

run = stable_spam("1b")
