"""One proxy, and several as one: the weighted sum of some, or another one for each row of a batch.

All answer `accept_logits(features, rows)` and say by `config` what they are offered and what they read.
"""

import dataclasses
import hashlib
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from .candidates import NUM_SCALARS
from .config import FILLED_IN, ProxyConfig
from .files import other_copy
from .gate import ProxyMLP

LM_ITSELF = "__base__"  # PEFT's name, in a mixed batch, for a row without adapter


def sha256_of(tensors: dict[str, torch.Tensor]) -> str:
    """Checksum of tensors by name; safetensors itself notices truncation but no flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


class Proxy(nn.Module):
    """One proxy: its configuration, its gate (the policy) and its critic."""

    def __init__(self, config: ProxyConfig):
        super().__init__()
        self.config = config
        # As `taps.HiddenTap` and `PooledTap` put them together: each layer's state, then each layer's mean state.
        sizes: list[Any] = [config.hidden_size] * len(config.feature_layers) * (2 if config.pooled_features else 1)
        scalars = 0
        if config.features == "prefix":
            sizes, scalars = [*sizes, config.embedding_size], NUM_SCALARS
        self.gate = ProxyMLP(sizes, scalars, config.gate_hidden_sizes, config.initial_accept_bias)
        self.critic = ProxyMLP(sizes, scalars, config.gate_hidden_sizes, 0.0)

    def accept_logits(self, features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Accept logits `(N,)` of the features `(N, feature_size)`, whichever rows of the batch they are of."""
        return self.gate(features)

    def load_weights(self, path: str) -> None:
        """Loads `proxy_model.safetensors`; `ValueError` where the file is damaged or of another shape."""
        try:
            weights = load_file(path)
            with safe_open(path, "pt") as file:
                expected = (file.metadata() or {}).get("sha256")
            if expected not in (None, sha256_of(weights)):
                raise RuntimeError("its checksum is another")
            self.load_state_dict(weights)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{path} does not fit its {type(self.config).__name__} (damaged, or made with other sizes): "
                f"{' '.join(str(error).split())}{other_copy(path)}."
            ) from error


class WeightedProxy(nn.Module):
    """Several proxies as one: its accept logit is the weighted sum of what each has above its own threshold.

    Raises:
        `ValueError`: the proxies do not read, or are not offered, the same.
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
    """Another proxy for each row of a batch: what it has above its own threshold. A row of [`LM_ITSELF`] accepts
    everything.

    Args:
        proxies: by name.
        names: of each row's proxy.
        device: of the batch.

    Raises:
        `ValueError`: the proxies do not read, or are not offered, the same.
    """

    def __init__(self, proxies: dict[str, Proxy | WeightedProxy], names: list[str], device: torch.device):
        parts = {name: proxies[name] for name in dict.fromkeys(names) if name != LM_ITSELF}
        if not parts:
            raise ValueError("`proxy_names` names no proxy: decode inside `disable_proxy()`.")
        self.config = _common_config(parts, "cannot decode in one batch")
        self.parts, order = list(parts.values()), list(parts)
        self.index = torch.tensor([order.index(name) if name in parts else -1 for name in names], device=device)

    def accept_logits(self, features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Accept logits `(N,)` of the features `(N, feature_size)`, which are of the rows `(N,)` of the batch."""
        logits = torch.full(rows.shape, torch.inf, device=features.device)
        for i, part in enumerate(self.parts):
            mine = self.index[rows] == i
            logits[mine] = part.accept_logits(features[mine], rows[mine]) - part.config.threshold
        return logits


def _common_config(proxies: dict[str, Proxy | WeightedProxy], what_for: str) -> ProxyConfig:
    """The configuration that proxies share, without a threshold; `ValueError` where they share none."""
    (first, config), *others = [(name, proxy.config) for name, proxy in proxies.items()]
    own = {"gate_hidden_sizes", "initial_accept_bias", "threshold", *FILLED_IN}
    for name, other in others:
        for key in (field.name for field in dataclasses.fields(config)):
            if key not in own and getattr(other, key) != getattr(config, key):
                raise ValueError(
                    f"The proxies {first} and {name} {what_for}: `{key}` is {getattr(config, key)!r} in the one and "
                    f"{getattr(other, key)!r} in the other."
                )
    return dataclasses.replace(config, threshold=0.0)
