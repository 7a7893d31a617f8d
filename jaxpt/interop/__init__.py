"""Models in from Hugging Face and out to it, without torch."""
