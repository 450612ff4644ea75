"""Off the CPU a step of the gate has fixed shapes and asks the device nothing, so CUDA graphs and `torch.compile` can
take it. Meta tensors stand for a device here: they have shapes, but nothing that could be read or counted."""

import contextlib
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch

from trl_proxy.core.config import ProxyConfig
from trl_proxy.core.features import accept_logits
from trl_proxy.decoding.prefix import PrefixGate
from trl_proxy.modeling.proxies import Proxy


@pytest.fixture
def gate_on_meta(monkeypatch):
    """`gate_on_meta(sample, **config)`: a gate as logits processor, for 3 prompts of 5 tokens."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # does not know the device

    def make(sample: bool, **options) -> PrefixGate:
        sizes = {"hidden_size": 32, "embedding_size": 32, "gate_hidden_sizes": [16], "pooled_features": False}
        config = ProxyConfig(**sizes, max_candidates=4, **options)
        with torch.device("meta"):
            proxy, embed, state = Proxy(config), torch.nn.Embedding(96, 32), torch.zeros(3, 32)
            mask = torch.ones(3, 5, dtype=torch.long)
        judge = functools.partial(accept_logits, proxy.requires_grad_(False), embed.requires_grad_(False))
        return PrefixGate(judge, config, SimpleNamespace(read=lambda _: state), mask, 0.5, sample, keep_hidden=True)

    return make


@pytest.mark.parametrize(
    ("proposal", "p_t_mode", "temperature", "sample"),
    list(itertools.product(["ranked", "sampled"], ["relative", "absolute"], [0.7, 1.0], [False, True])),
)
def test_a_step_has_fixed_shapes(gate_on_meta, proposal, p_t_mode, temperature, sample):
    gate = gate_on_meta(sample, proposal=proposal, p_t_mode=p_t_mode, temperature=temperature)
    ids, scores = torch.zeros(3, 6, dtype=torch.long, device="meta"), torch.zeros(3, 96, device="meta")
    assert gate(ids, scores).shape == scores.shape
    torch.compiler.reset()
    compiled = torch.compile(lambda ids, scores: gate(ids, scores), fullgraph=True, backend="eager")
    assert compiled(ids, scores).shape == scores.shape


def test_what_reads_the_device_fails_here(gate_on_meta):
    gate = gate_on_meta(False, p_t=0.01)
    gate.accept_logits = lambda *_: torch.zeros(3, 4, device="meta").nonzero()
    with pytest.raises(NotImplementedError, match="nonzero"):
        gate(torch.zeros(3, 6, dtype=torch.long, device="meta"), torch.zeros(3, 96, device="meta"))
