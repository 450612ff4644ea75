"""What the gate returns for cached features."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput


@dataclass
class ProxyOutput(ModelOutput):
    """The gate's output for decisions, `(N,)` float32 each. (Not `values`: DDP calls that name as a method.)"""

    accept_logits: torch.Tensor | None = None
    state_values: torch.Tensor | None = None
