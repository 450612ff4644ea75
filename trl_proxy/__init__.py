"""Proxy-RLHF on TRL: align a frozen language model with a small gate that accepts or rejects its tokens."""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core.config import ProxyConfig
    from .modeling.causal_lm import ProxyModelForCausalLM
    from .trainer.config import PPOConfig, ProxyPPOConfig
    from .trainer.ppo import PPOTrainer
    from .trainer.proxy_ppo import ProxyPPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "ProxyConfig", "ProxyModelForCausalLM", "ProxyPPOConfig", "ProxyPPOTrainer"]

__version__ = "0.1.0"

# Imported on first use: `trl_proxy.core` needs only torch.
_MODULES = {
    "PPOConfig": "trainer.config",
    "PPOTrainer": "trainer.ppo",
    "ProxyConfig": "core.config",
    "ProxyModelForCausalLM": "modeling.causal_lm",
    "ProxyPPOConfig": "trainer.config",
    "ProxyPPOTrainer": "trainer.proxy_ppo",
}

# On a CPU with bfloat16, bitsandbytes says at every start that an optional kernel could not be downloaded.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
