"""What the gate reads: hidden states of the frozen LM, seen by hooks while it runs (SKAM's features, arXiv 2403.04283,
section 3). The LM is not changed, and nothing is computed twice."""

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


def own_hook(register: Callable[..., RemovableHandle], hook: Callable, **options) -> RemovableHandle:
    """Registers a hook that sees the forwards of the calling thread alone. A server's threads share one LM.

    Args:
        register: a module's `register_forward_hook` or `register_forward_pre_hook`.
        hook, options: its arguments.
    """
    owner = threading.get_ident()

    def of_owner(*args):
        return hook(*args) if threading.get_ident() == owner else None

    return register(of_owner, **options)


def without_peft(lm: nn.Module) -> nn.Module:
    """The LM itself, without PEFT's wrapper."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def execution_device(lm: nn.Module) -> torch.device:
    """Where a module computes and what it reads must be. Weights that accelerate keeps elsewhere until they are used
    are on `meta`."""
    lm = without_peft(lm)
    place = getattr(getattr(lm, "_hf_hook", None), "execution_device", None)
    if place is not None:
        return torch.device(place)
    held = (x.device for tensors in (lm.parameters(), lm.buffers()) for x in tensors)
    return next((device for device in held if device.type != "meta"), torch.device("cpu"))


def input_embeddings(lm: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """The LM's input embeddings, for token ids on any device."""
    embed = lm.get_input_embeddings()
    return lambda token_ids: embed(token_ids.to(execution_device(embed)))


def parameters_of(lm: nn.Module) -> frozenset[str]:
    """Names of the arguments of the LM's forward."""
    return frozenset(inspect.signature(without_peft(lm).forward).parameters)


def bodies_of(lm: nn.Module) -> list[PreTrainedModel]:
    """The models inside an LM that may return its last hidden state, without PEFT's wrapper. Most LMs have one. Some
    have several inside each other, of which some are never called, as the decoder of OPT or the text model of an LM
    for images. The last one that returns before the head gives the state that the head reads."""
    bodies = []
    inside = [without_peft(lm)]
    while inside:
        for module in inside.pop().children():
            if isinstance(module, PreTrainedModel):
                bodies.append(module)
            if not isinstance(module, nn.ModuleList):  # not into the layers
                inside.append(module)
    return bodies


@contextmanager
def record_body(lm: nn.Module):
    """A list that gets the last hidden states `(batch, length, hidden_size)` of every forward of the LM's body."""
    states: list[torch.Tensor] = []
    bodies = bodies_of(lm)
    inside = {body: bodies_of(body) for body in bodies}
    last: list[nn.Module] = []

    def record(body, _args, output):
        if last and last[0] in inside[body]:  # part of the same forward
            states.pop()
        last[:] = [body]
        states.append(output[0])

    hooks = [own_hook(body.register_forward_hook, record) for body in bodies]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def state_size_of(lm: PreTrainedModel) -> int:
    """Size of the LM's last hidden state. It is the configuration's, unless the head reads another size, as that of
    OPT-350m does. Then one token is read to see it."""
    size = lm.config.get_text_config().hidden_size
    if getattr(lm.get_output_embeddings(), "in_features", None) == size:
        return size
    with torch.no_grad(), HiddenStateHook(lm) as states:
        lm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=execution_device(lm)))
    return states.hidden.shape[-1]


def embedding_size_of(lm: PreTrainedModel) -> int:
    """Size of the LM's input embeddings, which an adapter or a quantisation may have wrapped."""
    embed = lm.get_input_embeddings()
    sizes = (module.embedding_dim for module in embed.modules() if isinstance(module, nn.Embedding))
    if (size := next(sizes, None)) is not None:
        return size
    return input_embeddings(lm)(torch.zeros(1, dtype=torch.long)).shape[-1]


def reader_of(lm: nn.Module, layer: int) -> nn.Module | None:
    """The LM's layer that reads a hidden state, counted as in transformers' `hidden_states`; None for the last state,
    which the head reads. `ValueError` if there is no such layer."""
    if layer == -1:
        return None
    count = lm.config.get_text_config().num_hidden_layers
    if not -count - 1 <= layer <= count:
        raise ValueError(
            f"`feature_layers` has {layer}, {type(lm).__name__} has {count} layers: take -{count + 1} to {count}."
        )
    if layer == count:
        return None
    modules = (module for body in bodies_of(lm) for module in body.modules())
    layers = next((m for m in modules if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if layers is None:
        raise ValueError(f"{type(lm).__name__} has no list of layers: leave `feature_layers` at [-1].")
    return layers[layer % (count + 1)]


class HiddenStateHook:
    """Context manager that sees hidden states of the LM in every forward of its own thread.

    Args:
        layers: the layers to see, as in `ProxyConfig.feature_layers`.
        select: called with the states `(batch, positions, hidden_size)` before the head, when `hidden` is known. It
            returns the states that the head runs on. The head is a fifth of a small LM's work.
        device: where the states are wanted, by default where the last of the layers computes.
    """

    def __init__(
        self,
        lm: nn.Module,
        layers: Sequence[int] = (-1,),
        select: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: torch.device | None = None,
    ):
        self.lm, self.select, self.device = lm, select, device
        self.readers = {layer: reader_of(lm, layer) for layer in layers}
        self.seen: dict[int, torch.Tensor] = {}
        self.hooks: list[Any] = []

    def __enter__(self) -> Self:
        for layer, reader in self.readers.items():
            if reader is None:
                see = functools.partial(self._see_last, layer)
                self.hooks += [own_hook(body.register_forward_hook, see) for body in bodies_of(self.lm)]
            else:
                see = functools.partial(self._see, layer)
                self.hooks.append(own_hook(reader.register_forward_pre_hook, see, with_kwargs=True))
        head = self.lm.get_output_embeddings()
        self.hooks.append(own_hook(head.register_forward_pre_hook, self._to_head))
        return self

    def __exit__(self, *exc) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    @property
    def hidden(self) -> torch.Tensor:
        """States of all positions of the last forward, layers concatenated: `(batch, positions, d)`."""
        return self._side_by_side(slice(None))

    @property
    def state(self) -> torch.Tensor:
        """What the gate reads of the last position, `(batch, state_size)` in the LM's dtype."""
        return self._side_by_side(-1)

    def read(self, width: int) -> torch.Tensor:
        """The [`state`] for the next token of texts of this width, which have been read since the last call."""
        return self.state

    def expect_shared_prefix(self, length: int, width: int) -> None:
        """Announces that the next forward reads the `length` tokens that all texts begin with. The forwards after it
        start at slot `width` of the batch."""

    def _side_by_side(self, positions) -> torch.Tensor:
        states = [self.seen[layer][:, positions] for layer in self.readers]
        states = [x.to(self.device or states[-1].device) for x in states]
        return torch.cat(states, dim=-1) if len(states) > 1 else states[0]

    def _see(self, layer: int, _module, args, kwargs) -> None:
        self.seen[layer] = args[0] if args else kwargs["hidden_states"]

    def _see_last(self, layer: int, _module, _args, output) -> None:
        self.seen[layer] = output[0]  # `last_hidden_state`, the first field of every class of output

    def _to_head(self, _module, args):
        hidden = args[0] if self.select is None else self.select(args[0])
        # A strided view, such as the last position of a prompt, makes torch expand the head's weights over the batch.
        # This happens even for one row, for which `contiguous` does nothing.
        return (hidden.clone(memory_format=torch.contiguous_format), *args[1:])
