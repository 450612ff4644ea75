"""What the gate reads: hidden states of the frozen LM, seen by hooks while it runs (SKAM's features, arXiv 2403.04283,
section 3). Nothing of the LM is changed, and nothing is computed twice."""

import functools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn


def without_peft(lm: nn.Module) -> nn.Module:
    """The LM itself, also where PEFT wraps it."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def body_of(lm: nn.Module) -> nn.Module:
    """The LM without its head, also where PEFT wraps it."""
    return without_peft(lm).base_model


@contextmanager
def record_body(lm: nn.Module):
    """A list that gets the last hidden states `(batch, length, hidden_size)` of every forward of the LM's body."""
    body: list[torch.Tensor] = []
    hook = body_of(lm).register_forward_hook(lambda _m, _a, output: body.append(output.last_hidden_state))
    try:
        yield body
    finally:
        hook.remove()


def reader_of(lm: nn.Module, layer: int) -> nn.Module | None:
    """The LM's layer that reads a hidden state, counted as in transformers' `hidden_states`; None for the last state,
    which the head reads. `ValueError` where there is none."""
    count = lm.config.get_text_config().num_hidden_layers
    if not -count - 1 <= layer <= count:
        raise ValueError(
            f"`feature_layers` has {layer}, {type(lm).__name__} has {count} layers: take -{count + 1} to {count}."
        )
    if layer in (-1, count):
        return None
    layers = next((m for m in body_of(lm).modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if layers is None:
        raise ValueError(f"{type(lm).__name__} has no list of layers: leave `feature_layers` at [-1].")
    return layers[layer % (count + 1)]


class HiddenTap:
    """Context manager that sees hidden states of the LM in every forward.

    Args:
        layers: which ones, see `ProxyConfig.feature_layers`.
        select: called with the states `(batch, positions, hidden_size)` on their way into the head, when `hidden`
            has been seen; returns what the head runs on instead: the head is a fifth of a small LM's work.
    """

    def __init__(
        self,
        lm: nn.Module,
        layers: Sequence[int] = (-1,),
        select: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.lm, self.select = lm, select
        self.readers = {layer: reader_of(lm, layer) for layer in layers}
        self.seen: dict[int, torch.Tensor] = {}
        self.hooks: list[Any] = []

    def __enter__(self) -> Self:
        for layer, reader in self.readers.items():
            if reader is None:
                see = functools.partial(self._see_last, layer)
                self.hooks.append(body_of(self.lm).register_forward_hook(see))
            else:
                see = functools.partial(self._see, layer)
                self.hooks.append(reader.register_forward_pre_hook(see, with_kwargs=True))
        self.hooks.append(self.lm.get_output_embeddings().register_forward_pre_hook(self._to_head))
        return self

    def __exit__(self, *exc) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    @property
    def hidden(self) -> torch.Tensor:
        """States of all positions of the last forward, layer beside layer: `(batch, positions, d)`."""
        return self._side_by_side(slice(None))

    @property
    def state(self) -> torch.Tensor:
        """What the gate reads of the last position, `(batch, state_size)` in the LM's dtype."""
        return self._side_by_side(-1)

    def expect_common_start(self, length: int, width: int) -> None:
        """The next forward is of the `length` tokens that all texts begin with; those after it go on at slot `width`
        of the batch, where the longest of them do."""

    def _side_by_side(self, positions) -> torch.Tensor:
        states = [self.seen[layer][:, positions] for layer in self.readers]
        return torch.cat([x.to(states[-1].device) for x in states], dim=-1) if len(states) > 1 else states[0]

    def _see(self, layer: int, _module, args, kwargs) -> None:
        self.seen[layer] = args[0] if args else kwargs["hidden_states"]

    def _see_last(self, layer: int, _module, _args, output) -> None:
        self.seen[layer] = output.last_hidden_state

    def _to_head(self, _module, args):
        hidden = args[0] if self.select is None else self.select(args[0])
        # A strided view, as the last position of a prompt is, makes torch expand the head's weights over the batch.
        # The strides count even where the batch is one row, for which `contiguous` does nothing.
        return (hidden.clone(memory_format=torch.contiguous_format), *args[1:])


class PooledTap(HiddenTap):
    """The same, and the mean of those states over all positions that the LM has read, padding left out.

    Args:
        attention_mask: `(batch, prompt length)`. What comes after its width is no padding. The LM may read each
            distinct prompt once before the rows of the batch go on from it.
    """

    def __init__(self, lm: nn.Module, layers: Sequence[int], attention_mask: torch.Tensor):
        super().__init__(lm, layers)
        self.mask, self.length = attention_mask, 0
        self.total = self.count = torch.zeros(1, 1, device=attention_mask.device)
        self.common: tuple[int, int] | None = None

    def expect_common_start(self, length: int, width: int) -> None:
        self.common = length, width

    def __enter__(self) -> Self:
        super().__enter__()
        self.hooks.append(body_of(self.lm).register_forward_hook(self._pool))
        return self

    def _pool(self, _module, _args, _output) -> None:
        hidden = self.hidden.float()
        if self.common is not None:
            length, self.length = self.common
            self.total, self.count, self.common = hidden.sum(1), self.count + length, None
            # Of texts with more padding some of these tokens are read again, and do not count again.
            self.mask = self.mask * (self.mask.cumsum(-1) > length)
            return
        mask = self.mask[:: len(self.mask) // len(hidden), self.length : self.length + hidden.shape[1]].to(hidden)
        mask = nn.functional.pad(mask, (0, hidden.shape[1] - mask.shape[1]), value=1.0)
        repeats = len(hidden) // len(self.total)
        self.total = self.total.repeat_interleave(repeats, dim=0) + (hidden * mask[..., None]).sum(1)
        self.count = self.count.repeat_interleave(repeats, dim=0) + mask.sum(1, keepdim=True)
        self.length += hidden.shape[1]

    @property
    def state(self) -> torch.Tensor:
        state = super().state
        return torch.cat([state, (self.total / self.count.clamp(min=1)).to(state.dtype)], dim=-1)
