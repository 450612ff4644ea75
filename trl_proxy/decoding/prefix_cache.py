"""A cache for `generate` that grows in place and reads a shared prompt prefix once."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .hidden_states import HiddenStateHook, parameters_of, without_peft

# Read a shared prompt prefix once only if that saves at least this many tokens: the extra forward is not free.
SHARED_TOKENS = 64


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, with room for new tokens. Transformers' own layer copies all of them at every
    token, which costs more as the text grows."""

    def __init__(self):
        super().__init__()
        self.room: dict[str, torch.Tensor] = {}

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        self.keys = self._append("keys", key_states, start)
        self.values = self._append("values", value_states, start)
        return self.keys, self.values

    def _append(self, name: str, new: torch.Tensor, start: int) -> torch.Tensor:
        held, end = getattr(self, name), start + new.shape[-2]
        room: Any = self.room.get(name)
        # If rows were chosen or repeated, `held` is a new tensor and not the view.
        is_view = room is not None and held.data_ptr() == room.data_ptr() and held.shape[0] == room.shape[0]
        if not is_view or end > room.shape[-2]:
            room = new.new_empty(*new.shape[:-2], end + max(32, end // 8), new.shape[-1])
            if start:
                room[..., :start, :] = held
            self.room[name] = room
        room[..., start:end, :] = new
        return room[..., :end, :]

    def reset(self) -> None:
        self.room.clear()
        super().reset()


def growing_cache(lm: nn.Module) -> DynamicCache | None:
    """An empty cache as `generate` makes it, except that layers with full attention grow in place. None for an LM that
    keeps something other than keys and values, as state-space models do."""
    if "past_key_values" not in parameters_of(lm) or not lm._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=lm.config.get_text_config(decoder=True))
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def takes_positions(lm: nn.Module) -> bool:
    """Whether the LM takes the position of each token, and reads a text in parts as it reads the whole. Some LMs count
    for themselves. Those for images may let the tokens of a prompt see each other, and read more than tokens."""
    return "position_ids" in parameters_of(lm) and not without_peft(lm).config.sub_configs


def shared_prefix_length(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
    """The number of tokens that all prompts begin with, without their last ones. 0 if sharing them saves too little,
    or if the mask covers anything but left padding."""
    rows, width = input_ids.shape
    slots = torch.arange(width, device=input_ids.device)
    padding = width - attention_mask.sum(-1, keepdim=True)
    begun = input_ids.gather(-1, (slots + padding).clamp(max=width - 1))
    alike = (begun == begun[:1]).all(0) & (slots < width - 1 - padding.max())
    length = int(alike.cumprod(0).sum()) if torch.equal(attention_mask.bool(), slots >= padding) else 0
    return length if length * (rows - 1) >= SHARED_TOKENS else 0


def prefill_shared_prefix(
    lm: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, tap: HiddenStateHook | None = None
) -> DynamicCache | None:
    """The [`growing_cache`] of the prefix that the prompts `(batch, length)` share, for example a system prompt. It is
    read once for all prompts, and `generate` continues from it. The cache is empty if there is no such prefix.

    Args:
        tap: also sees the states of this forward.
    """
    cache = growing_cache(lm)
    if cache is None or not all(isinstance(layer, PreallocatedLayer) for layer in cache.layers):
        return cache
    if not takes_positions(lm):
        return cache
    length = shared_prefix_length(input_ids, attention_mask)
    if length == 0:
        return cache
    padding = input_ids.shape[1] - attention_mask.sum(-1, keepdim=True)
    width = int(padding.min()) + length
    if tap is not None:
        tap.expect_shared_prefix(length, width)
    _read(lm, cache, input_ids[:1, padding[0] : padding[0] + length], torch.ones_like(input_ids[:1, :length]))
    # The text of a padded row begins later; padding may hold anything.
    source = (torch.arange(width, device=input_ids.device) - padding).clamp(min=0)
    for layer in cache.layers:
        layer.keys, layer.values = (x[0][:, source.to(x.device)].transpose(0, 1) for x in (layer.keys, layer.values))
    return cache


def prefill(
    lm: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, tap: HiddenStateHook | None = None
) -> DynamicCache | None:
    """The [`growing_cache`] of prompts `(batch, length)` without their last token. `generate` can continue from it any
    number of times. Each prompt is read once, and so is a shared prefix. None if the LM does not allow it."""
    if not takes_positions(lm):
        return None
    cache = prefill_shared_prefix(lm, input_ids, attention_mask, tap)
    if cache is not None and cache.get_seq_length() < input_ids.shape[1] - 1:
        _read(lm, cache, input_ids[:, cache.get_seq_length() : -1], attention_mask[:, :-1])
    # An LM may ignore its cache, as encoders do.
    return cache if cache is not None and cache.get_seq_length() == input_ids.shape[1] - 1 else None


def _read(lm: nn.Module, cache: DynamicCache, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Adds tokens to the cache; `attention_mask` also covers the tokens in the cache."""
    with HiddenStateHook(lm, layers=(), select=lambda hidden: hidden[:1, -1:]):  # nobody reads the logits
        lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": 1} if "logits_to_keep" in parameters_of(lm) else {}),
        )
