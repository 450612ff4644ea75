"""The old module of the functions in [`loading`]."""

from .loading import EMBEDDED, load_lm, load_prompts, load_reward, resolve_model

__all__ = ["EMBEDDED", "load_lm", "load_prompts", "load_reward", "resolve_model"]
