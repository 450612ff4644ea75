"""A key-value cache with one write position per row, for the loop of candidate features."""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer, `(rows, heads, capacity, head size)`, written at the cache's `slots`."""

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
            slots = self.cache.slots.to(key_states.device)
            rows = torch.arange(len(key_states), device=key_states.device)[:, None]
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.cache.width], self.values[:, :, : self.cache.width]

    def get_mask_sizes(self, query_length):
        return self.cache.width, 0

    def get_seq_length(self):
        return 0 if self.cache.slots is None else self.cache.width - self.cache.slots.shape[1]

    def get_max_length(self):
        return self.cache.capacity


class RowCache(Cache):
    """A key-value cache with one write position per row, so that a rejected token's slot is simply overwritten.

    The prompt is written first, to slots 0 to `width - 1`. After `set_write_positions(slots, n)`, the n new tokens of
    row r go to `slots[r]` and the slots after it. The caller's attention mask must hide all slots further right.
    """

    def __init__(self, num_layers: int, prompt_width: int, capacity: int):
        self.capacity, self.width = capacity, prompt_width
        self.slots: Any = None  # `(rows, n)` int64 after the prompt
        self.start: int | None = 0  # first slot if it is the same for all rows: copying a slice is faster
        super().__init__(layers=[_RowLayer(self) for _ in range(num_layers)])

    @classmethod
    def for_lm(cls, lm, prompt_width: int, capacity: int) -> "RowCache":
        """With as many layers as the cache that `generate` makes for this LM."""
        return cls(len(DynamicCache(config=lm.config.get_text_config(decoder=True)).layers), prompt_width, capacity)

    def set_write_positions(self, slots: torch.Tensor, n: int, first: int, last: int) -> int:
        """Sets the first write positions `(rows,)` of the next n tokens, `first` the lowest of them and `last` the
        highest; returns how many slots their forward sees."""
        self.slots, self.width = slots[:, None] + torch.arange(n, device=slots.device), last + n
        self.start = first if first == last else None
        return self.width

    def move(self, rows: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """In each of these rows, copies the slot `source` over the slot `target`; `(N,)` each."""
        for layer in self.layers:
            of_row, of_target, of_source = (x.to(layer.keys.device) for x in (rows, target, source))
            layer.keys[of_row, :, of_target] = layer.keys[of_row, :, of_source]
            layer.values[of_row, :, of_target] = layer.values[of_row, :, of_source]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps only these rows, in this order."""
        for layer in self.layers:
            layer.keys, layer.values = (x[rows.to(x.device)] for x in (layer.keys, layer.values))
