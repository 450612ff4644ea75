"""Keys and values of what the LM has read: a cache that grows in place, for `generate`, what prompts share being read
once, and a cache with one write position per row, for the loop of candidate features. And what pooled features add to
a cache."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .taps import HiddenTap

# What the prompts of a batch begin with in common is read once where that spares the LM so many tokens: a forward of
# its own has its price.
COMMON_TOKENS = 64


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room behind them, where a new token is written. Transformers' own layer copies
    all of them at every token, which costs the more the longer the text is."""

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
        # Where rows were chosen or repeated, another tensor stands in place of the view.
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
    """An empty cache as `generate` makes it, but that it grows in place where attention sees the whole text; None for
    an LM that keeps something other than keys and values, as state-space models do."""
    cache = DynamicCache(config=lm.config) if lm._supports_default_dynamic_cache() else None
    if cache is None or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _SumsLayer(_RoomyLayer):
    """Beside the LM's layers in its cache: sums of hidden states up to each token, as keys, and how many they are, as
    values. So they follow whatever is done to the cache: rows reordered for beams, drafted tokens cropped."""

    def __init__(self, feature_layers: list[int]):
        super().__init__()
        self.feature_layers = feature_layers


def sums_so_far(
    cache: Cache | None, past: int, feature_layers: list[int], hidden: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What pooled features are made of: sums of the hidden states up to each new position, and how many they are.

    Args:
        cache: in which these sums are kept, and taken up again.
        past: how many tokens it held before.
        feature_layers: whose states these are.
        hidden: `(batch, length, d)` of the new positions.
        mask: `(batch, length)` float32, 0 for padding.

    Returns:
        `(batch, length, d)` and `(batch, length, 1)` in float32.

    Raises:
        `ValueError`: the cache holds tokens whose states were not seen.
    """
    total, count = (hidden.float() * mask[..., None]).cumsum(1), mask.cumsum(1)[..., None]
    if cache is None:
        return total, count
    mine = (x for x in cache.layers if isinstance(x, _SumsLayer) and x.feature_layers == feature_layers)
    layer = next(mine, None) or _SumsLayer(feature_layers)
    if layer.get_seq_length() != past:
        raise ValueError("Pooled features need to have seen the whole text: this cache was filled elsewhere.")
    if past:
        total, count = total + layer.keys[:, 0, -1:], count + layer.values[:, 0, -1:]
    if layer not in cache.layers:
        cache.layers.append(layer)
    layer.update(total[:, None], count[:, None])
    return total, count


def common_start(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
    """How many tokens all of these prompts begin with, their last ones left out; 0 where reading them once would save
    too little, or where something other than padding on the left is masked."""
    rows, width = input_ids.shape
    slots = torch.arange(width, device=input_ids.device)
    padding = width - attention_mask.sum(-1, keepdim=True)
    begun = input_ids.gather(-1, (slots + padding).clamp(max=width - 1))
    alike = (begun == begun[:1]).all(0) & (slots < width - 1 - padding.max())
    length = int(alike.cumprod(0).sum()) if torch.equal(attention_mask.bool(), slots >= padding) else 0
    return length if length * (rows - 1) >= COMMON_TOKENS else 0


def read_common_start(
    lm: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, tap: HiddenTap | None = None
) -> DynamicCache | None:
    """The [`growing_cache`] of the prompts `(batch, length)` up to where they differ: a system prompt, say, is read
    once for all of them, and `generate` goes on from it. Empty where they have no such start.

    Args:
        tap: sees what is read here too.
    """
    cache = growing_cache(lm)
    if cache is None or not all(isinstance(layer, _RoomyLayer) for layer in cache.layers):
        return cache
    length = common_start(input_ids, attention_mask)
    if length == 0:
        return cache
    padding = input_ids.shape[1] - attention_mask.sum(-1, keepdim=True)
    width = int(padding.min()) + length
    if tap is not None:
        tap.expect_common_start(length, width)
    _read(lm, cache, input_ids[:1, padding[0] : padding[0] + length], torch.ones_like(input_ids[:1, :length]))
    # Where a row is padded, its texts begin later; what is padding may hold anything.
    source = (torch.arange(width, device=input_ids.device) - padding).clamp(min=0)
    for layer in cache.layers:
        layer.keys, layer.values = (x[0][:, source].transpose(0, 1) for x in (layer.keys, layer.values))
    return cache


def prefill(
    lm: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, tap: HiddenTap | None = None
) -> DynamicCache | None:
    """The [`growing_cache`] of prompts `(batch, length)` but for their last token, from which `generate` goes on as
    often as one likes, so that no prompt is read twice, and what all begin with once."""
    cache = read_common_start(lm, input_ids, attention_mask, tap)
    if cache is not None and cache.get_seq_length() < input_ids.shape[1] - 1:
        _read(lm, cache, input_ids[:, cache.get_seq_length() : -1], attention_mask[:, :-1])
    return cache


def _read(lm: nn.Module, cache: DynamicCache, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Adds tokens to the cache; `attention_mask` is also of those that are in it."""
    with HiddenTap(lm, layers=(), select=lambda hidden: hidden[:1, -1:]):  # nobody reads the logits
        lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer, `(rows, heads, capacity, head size)`, written where the cache's rows stand."""

    is_sliding = False

    def __init__(self, cache: "RowCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states, value_states):
        rows, heads = key_states.shape[:2]
        self.keys = key_states.new_zeros(rows, heads, self.cache.capacity, key_states.shape[-1])
        self.values = value_states.new_zeros(rows, heads, self.cache.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cache.start is not None:
            self.keys[:, :, self.cache.start : self.cache.width] = key_states
            self.values[:, :, self.cache.start : self.cache.width] = value_states
        else:
            rows = torch.arange(len(key_states), device=key_states.device)[:, None]
            self.keys[rows, :, self.cache.slots] = key_states.transpose(1, 2)
            self.values[rows, :, self.cache.slots] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.cache.width], self.values[:, :, : self.cache.width]

    def get_mask_sizes(self, query_length):
        return self.cache.width, 0

    def get_seq_length(self):
        return 0 if self.cache.slots is None else self.cache.width - self.cache.slots.shape[1]

    def get_max_length(self):
        return self.cache.capacity


class RowCache(Cache):
    """A key-value cache with one write position per row, so that a rejected token's slot is simply overwritten.

    The prompt is written first, slots 0 to `width - 1`. From `at(slots, n)` on, the n new tokens of row r go to
    `slots[r]` and after; whatever else stands to the right is hidden by the attention mask, which is the caller's.
    """

    def __init__(self, num_layers: int, prompt_width: int, capacity: int):
        self.capacity, self.width = capacity, prompt_width
        self.slots: Any = None  # `(rows, n)` int64 after the prompt
        self.start: int | None = 0  # where all rows stand, if they do at one slot: copying a slice is faster
        super().__init__(layers=[_RowLayer(self) for _ in range(num_layers)])

    def at(self, slots: torch.Tensor, n: int) -> int:
        """Sets the first write positions `(rows,)` of the next n tokens; returns how many slots their forward sees."""
        first, last = torch.stack(slots.aminmax()).tolist()
        self.slots, self.width = slots[:, None] + torch.arange(n, device=slots.device), last + n
        self.start = first if first == last else None
        return self.width

    def move(self, rows: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """In each of these rows, copies the slot `source` over the slot `target`; `(N,)` each."""
        for layer in self.layers:
            layer.keys[rows, :, target] = layer.keys[rows, :, source]
            layer.values[rows, :, target] = layer.values[rows, :, source]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps these rows alone, in this order."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
