"""One proxy, or several as one: a weighted sum, or one proxy for each row of a batch.

All have `accept_logits(features, rows)`, and a `config` that says what they are offered and what they read.
"""

import dataclasses
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from ..core.config import MODEL_FIELDS, ProxyConfig
from ..core.features import part_sizes, places_of
from ..core.gate import ProxyMLP
from .fingerprint import sha256_of

LM_ITSELF = "__base__"  # PEFT's name, in a mixed batch, for a row without adapter


class Proxy(nn.Module):
    """One proxy: its configuration, its gate (the policy) and its critic."""

    def __init__(self, config: ProxyConfig):
        super().__init__()
        self.config = config
        sizes, scalars = part_sizes(config)
        self.gate = ProxyMLP(sizes, scalars, config.gate_hidden_sizes, config.initial_accept_bias)
        self.critic = ProxyMLP(sizes, scalars, config.gate_hidden_sizes, 0.0)

    def accept_logits(self, features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Accept logits `(N,)` of the features `(N, feature_size)`; `rows` is not used."""
        return self.gate(features)

    def _apply(self, fn, recurse=True):
        """Moves the proxy to another device, but never to another dtype: `model.to(torch.bfloat16)` is for the LM."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def load_weights(self, path: str) -> None:
        """Loads `proxy_model.safetensors`; `ValueError` if the file is damaged or of another shape."""
        try:
            weights = load_file(path)
            with safe_open(path, "pt") as file:
                expected = (file.metadata() or {}).get("sha256")
            if expected not in (None, sha256_of(weights)):
                raise RuntimeError("its checksum differs")
            self.load_state_dict(weights)
        except (RuntimeError, SafetensorError) as error:
            copy = _copy_in_checkpoint(path)
            raise ValueError(
                f"{path} does not fit its {type(self.config).__name__} (damaged, or made with other sizes): "
                f"{' '.join(str(error).split())}{f'; {copy} holds a copy' if copy else ''}."
            ) from error


def _copy_in_checkpoint(path: str) -> str | None:
    """The last checkpoint in the folder of a file, if it has that file as well."""
    folder, name = os.path.split(os.path.abspath(path))
    last = get_last_checkpoint(folder)
    return last if last and os.path.isfile(os.path.join(last, name)) else None


class WeightedProxy(nn.Module):
    """Several proxies as one: its accept logit is the weighted sum of `accept logit - threshold` of each.

    Raises:
        `ValueError`: the proxies differ in what they read or are offered.
    """

    def __init__(self, proxies: dict[str, Proxy], weights: list[float]):
        super().__init__()
        if not proxies or len(proxies) != len(weights):
            raise ValueError(f"There are {len(weights)} weights for {len(proxies)} proxies.")
        self.config = _common_config(proxies, "cannot be added")
        self.parts, self.weights = nn.ModuleList(proxies.values()), list(weights)

    def gate(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(..., feature_size)` -> accept logits `(...)`."""
        parts = zip(self.weights, self.parts, strict=True)
        return sum(weight * (part.gate(features) - part.config.threshold) for weight, part in parts)

    def accept_logits(self, features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """As [`Proxy.accept_logits`]."""
        return self.gate(features)


class RowProxies:
    """One proxy for each row of a batch; its accept logit is `accept logit - threshold` of that proxy. A row of
    [`LM_ITSELF`] accepts everything.

    Args:
        proxies: by name.
        names: of each row's proxy.
        device: of the batch.

    Raises:
        `ValueError`: the proxies differ in what they read or are offered.
    """

    def __init__(self, proxies: dict[str, Proxy | WeightedProxy], names: list[str], device: torch.device):
        parts = {name: proxies[name] for name in dict.fromkeys(names) if name != LM_ITSELF}
        if not parts:
            raise ValueError("`proxy_names` names no proxy: decode inside `disable_proxy()`.")
        self.config = _common_config(parts, "cannot decode in one batch")
        self.parts, order = list(parts.values()), list(parts)
        self.index = torch.tensor([order.index(name) if name in parts else -1 for name in names], device=device)

    def accept_logits(self, features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Accept logits `(N,)` of the features `(N, feature_size)`; `rows` `(N,)` are their rows in the batch."""
        logits = torch.full(rows.shape, torch.inf, device=features.device)
        for i, part in enumerate(self.parts):
            mine = self.index[rows] == i
            places = places_of(mine)
            own = part.accept_logits(features[places], rows[places]) - part.config.threshold
            logits = torch.where(mine, logits.index_copy(0, places, own), logits)
        return logits


def _common_config(proxies: dict[str, Proxy | WeightedProxy], what_for: str) -> ProxyConfig:
    """The configuration that proxies share, with threshold 0; `ValueError` if they differ."""
    (first, config), *others = [(name, proxy.config) for name, proxy in proxies.items()]
    own = {"gate_hidden_sizes", "initial_accept_bias", "threshold", *MODEL_FIELDS}
    for name, other in others:
        for key in (field.name for field in dataclasses.fields(config)):
            if key not in own and getattr(other, key) != getattr(config, key):
                raise ValueError(
                    f"The proxies {first} and {name} {what_for}: `{key}` is {getattr(config, key)!r} in the one and "
                    f"{getattr(other, key)!r} in the other."
                )
    return dataclasses.replace(config, threshold=0.0)
