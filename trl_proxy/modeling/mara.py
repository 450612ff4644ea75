"""Import of actors trained by MARA (arXiv 2505.19743, github.com/IAAR-Shanghai/MARA) as proxies."""

import os

import torch
from transformers import PreTrainedModel

from ..core.config import ProxyConfig
from .causal_lm import ProxyModelForCausalLM

_LAYERS = ("ln", "linear1", "linear2", "output_linear")


@torch.no_grad()
def load_mara_actor(lm: PreTrainedModel, path: str | os.PathLike, **proxy_settings) -> ProxyModelForCausalLM:
    """A MARA actor over its LM, as a proxy with candidate features; `save_pretrained` writes it as any other.

    The actor is LayerNorm, two hidden layers with ReLU and a softmax over (reject, accept). The accept logit is the
    difference of the two outputs, and LayerNorm's scale and shift go into the first layer. Its probabilities are
    reproduced, but not its decoding: candidates are chosen by `p_t`, not by top-k and top-p. The last one is accepted
    if all others were rejected.

    Args:
        lm: the LM that the actor was trained on.
        path: the `.pth` file, a state dict; it is read without running code from it.
        proxy_settings: further fields of [`ProxyConfig`] (`p_t`, `max_candidates`, ...).

    Raises:
        `ValueError`: not such a file, or an actor for another hidden size.
    """
    try:
        actor = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"There is no file {os.fspath(path)}.") from None
    except Exception as error:  # other files fail in many ways
        raise ValueError(f"{os.fspath(path)} is not a state dict that can be read safely: {error}") from error
    keys = {f"{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias")}
    if not isinstance(actor, dict) or set(actor) != keys:
        found = ", ".join(sorted(map(str, actor))) if isinstance(actor, dict) else type(actor).__name__
        raise ValueError(
            f"{os.fspath(path)} is not a MARA actor: it needs {', '.join(sorted(keys))}, and has {found}."
        )
    actor = {name: value.float() for name, value in actor.items()}
    sizes = [len(actor[f"{layer}.bias"]) for layer in _LAYERS]
    hidden_size = lm.config.get_text_config().hidden_size
    if sizes[0] != hidden_size or sizes[-1] != 2:
        raise ValueError(
            f"{os.fspath(path)} holds an actor for hidden states of {sizes[0]} with {sizes[-1]} actions; this LM has "
            f"{hidden_size}, and a proxy 2."
        )
    model = ProxyModelForCausalLM(
        lm, ProxyConfig(features="candidate", pooled_features=False, gate_hidden_sizes=sizes[1:-1], **proxy_settings)
    )
    first, second, last = (layer for layer in model.gate.mlp if isinstance(layer, torch.nn.Linear))
    first.weight.copy_(actor["linear1.weight"] * actor["ln.weight"])
    first.bias.copy_(actor["linear1.bias"] + actor["linear1.weight"] @ actor["ln.bias"])
    second.weight.copy_(actor["linear2.weight"])
    second.bias.copy_(actor["linear2.bias"])
    last.weight.copy_(actor["output_linear.weight"][1] - actor["output_linear.weight"][0])
    last.bias.copy_(actor["output_linear.bias"][1] - actor["output_linear.bias"][0])
    return model
