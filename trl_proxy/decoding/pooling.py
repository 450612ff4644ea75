"""Pooled features: a state and the mean of the hidden states so far, which tells what the whole text is about.

All paths add up by [`running_sums`] and divide by [`with_mean`]. They keep the sums for the next token in different
places. In `generate` the hook keeps the last sums. In `forward` the LM's cache keeps all sums. The loop of candidate
features keeps the sums of the accepted tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .hidden_states import HiddenStateHook
from .prefix_cache import PreallocatedLayer


def running_sums(
    hidden: torch.Tensor, mask: torch.Tensor, before: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the hidden states up to each position, and their counts.

    Args:
        hidden: `(batch, length, d)` of new positions.
        mask: `(batch, length)`, 0 for padding.
        before: sums `(batch, d)` and counts `(batch, 1)` of the positions before.

    Returns:
        `(batch, length, d)` and `(batch, length, 1)` in float32.
    """
    mask = mask.float()
    total, count = (hidden.float() * mask[..., None]).cumsum(1), mask.cumsum(1)[..., None]
    return (total, count) if before is None else (total + before[0][:, None], count + before[1][:, None])


def with_mean(state: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The state `(..., d)`, then the mean of the states up to it: `(..., 2 d)` in the state's dtype."""
    return torch.cat([state, (total / count.clamp(min=1)).to(state.dtype)], dim=-1)


class PooledStateHook(HiddenStateHook):
    """A [`HiddenStateHook`] that adds the mean of the states over all positions read so far, without padding.

    Args:
        attention_mask: `(batch, prompt length)`. Positions after its width are not padding. The LM may read each
            distinct prompt once before it decodes the rows of the batch.
    """

    def __init__(self, lm: nn.Module, layers: Sequence[int], attention_mask: torch.Tensor):
        super().__init__(lm, layers, device=attention_mask.device)
        self.prompt_mask = attention_mask
        self.unread: list[torch.Tensor] = []  # the states of each forward since the last `read`
        self.shared: tuple[int, int] | None = None
        self._restart()

    def _restart(self) -> None:
        self.mask, self.length = self.prompt_mask, 0
        self.total = self.count = torch.zeros(1, 1, device=self.mask.device)

    def expect_shared_prefix(self, length: int, width: int) -> None:
        self.shared = length, width

    def _to_head(self, module, args):
        self.unread.append(self.hidden)
        return super()._to_head(module, args)

    def read(self, width: int) -> torch.Tensor:
        # Without a cache the LM reads the whole text again at every token. XLM reads a mask after it.
        if is_whole := len(self.unread) == 1 and self.unread[0].shape[1] >= width:
            self._restart()
        for hidden in self.unread:
            self._pool(hidden)
        self.unread.clear()
        if self.length != width and not is_whole:
            raise ValueError(
                f"Pooled features must see the whole text: the LM has read {self.length} of {width} tokens. Leave out "
                "the option that makes it skip some, or load a proxy with `pooled_features=False`."
            )
        return with_mean(self.state, self.total, self.count)

    def _pool(self, hidden: torch.Tensor) -> None:
        if self.shared is not None:
            mask = torch.ones(hidden.shape[:2], device=hidden.device)
            length, self.length = self.shared
            self.shared = None
            # Texts with more padding read some of these tokens again. They do not count twice.
            self.mask = self.mask * (self.mask.cumsum(-1) > length)
        else:
            mask = self.mask[:: len(self.mask) // len(hidden), self.length : self.length + hidden.shape[1]]
            mask = nn.functional.pad(mask.float(), (0, hidden.shape[1] - mask.shape[1]), value=1.0)
            self.length += hidden.shape[1]
        repeats = len(hidden) // len(self.total)
        before = [x.repeat_interleave(repeats, dim=0) for x in (self.total, self.count)]
        self.total, self.count = (x[:, -1] for x in running_sums(hidden, mask, (before[0], before[1])))


class PooledSumsLayer(PreallocatedLayer):
    """An extra layer of the LM's cache: sums of hidden states up to each token as keys, and their counts as values. So
    they follow all changes of the cache, such as reordered beams or cropped draft tokens."""

    def __init__(self, feature_layers: list[int]):
        super().__init__()
        self.feature_layers = feature_layers


def cached_sums(
    cache: Any, past: int, feature_layers: list[int], hidden: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`running_sums`] that continue the sums in the LM's cache, and are kept there.

    Args:
        cache: of the LM; None if there is no cache and `hidden` covers the whole text.
        past: how many tokens the cache held before.
        feature_layers: whose states these are.

    Raises:
        `ValueError`: the cache holds tokens whose states were not seen.
    """
    layers = getattr(cache, "layers", [])
    mine = (x for x in layers if isinstance(x, PooledSumsLayer) and x.feature_layers == feature_layers)
    layer = next(mine, None) or PooledSumsLayer(feature_layers)
    if layer.get_seq_length() != past:
        raise ValueError("Pooled features must see the whole text: this cache was filled elsewhere.")
    before = (layer.keys[:, 0, -1], layer.values[:, 0, -1]) if past else None
    total, count = running_sums(hidden, mask, before)
    if isinstance(cache, Cache):
        if layer not in layers:
            layers.append(layer)
        layer.update(total[:, None], count[:, None])
    return total, count


def length_of(cache: Any, text: torch.Tensor, attention_mask: torch.Tensor | None) -> int:
    """How many tokens a cache of the LM holds before it reads `text` `(batch, length, ...)`."""
    if any(isinstance(layer, CacheLayerMixin) for layer in getattr(cache, "layers", [])):
        return int(cache.get_seq_length())
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask.shape[1] - text.shape[1]
    return 0
