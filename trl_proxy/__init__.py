"""Proxy-RLHF on TRL: align a frozen language model with a small gate that accepts or rejects its tokens."""

from . import quiet  # noqa: F401 - before peft, which imports bitsandbytes

# isort: split

from .config import PPOConfig, ProxyConfig, ProxyPPOConfig
from .modeling import ProxyModelForCausalLM
from .ppo import PPOTrainer
from .proxy_ppo import ProxyPPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "ProxyConfig", "ProxyModelForCausalLM", "ProxyPPOConfig", "ProxyPPOTrainer"]

__version__ = "0.1.0"
