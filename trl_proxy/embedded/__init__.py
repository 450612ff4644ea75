"""The embedded language model and prompts, which need no model hub."""
