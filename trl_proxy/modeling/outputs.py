"""What the forward of a gated LM returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput


@dataclass
class ProxyOutput(ModelOutput):
    """The gate's output for decisions, `(N,)` float32 each. (Not `values`: DDP calls that name as a method.)"""

    accept_logits: torch.Tensor | None = None
    state_values: torch.Tensor | None = None


@dataclass
class GatedCausalLMOutput(CausalLMOutputWithPast):
    """The LM's output with gated `logits`; `lm_logits`, of the same shape, are the LM's own if requested."""

    lm_logits: torch.Tensor | None = None
