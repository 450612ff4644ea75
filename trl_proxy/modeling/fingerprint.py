"""Checksums that identify an LM."""

import hashlib
import math
from contextlib import suppress

import torch
from transformers import PreTrainedModel


def lm_sha256(lm: PreTrainedModel) -> str | None:
    """Checksum of an LM's sizes and the signs of its input embeddings (4,096 rows at most). No dtype, quantisation or
    adapter changes them. None if the embeddings are not in memory (offloaded, sharded).
    """
    weight, config = lm.get_input_embeddings().weight, lm.config.get_text_config()
    if weight.device.type == "meta" or weight.dim() != 2:
        return None
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = dict.fromkeys(sizes)
    for name in sizes:
        with suppress(AttributeError, ValueError, RuntimeError):  # a size that differs from layer to layer
            fields[name] = getattr(config, name)
    text = ", ".join([config.model_type, *(f"{name}={value}" for name, value in fields.items())])
    signs = torch.signbit(weight.detach()[:: math.ceil(len(weight) / 4096)]).to("cpu", torch.uint8)
    return sha256_of({text: signs})


def sha256_of(tensors: dict[str, torch.Tensor]) -> str:
    """Checksum of tensors by name; safetensors itself notices truncation but not a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
