"""LLaMA 350M by Stable-SPAM.

    jaxpt train configs/llama_350m_stable_spam.py --workdir runs/llama_350m_stable_spam

Every choice, and where it is from: ``_llama.py``.
"""

from configs._llama import stable_spam

run = stable_spam("350m")
