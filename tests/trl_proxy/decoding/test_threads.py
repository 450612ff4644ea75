"""Several threads use one LM at the same time: each gets what it gets alone."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GenerationConfig

from trl_proxy import ProxyConfig, ProxyModelForCausalLM

SMALL = {"p_t": 0.001, "gate_hidden_sizes": [16]}
KINDS = {
    "prefix": {"pooled_features": False},
    "pooled": {},
    "layers": {"feature_layers": [1, -1], "pooled_features": False},
    "candidate": {"features": "candidate", "pooled_features": False},
    "candidate, pooled": {"features": "candidate", "feature_layers": [-2, -1]},
}


@pytest.fixture
def switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def lm(tiny_lm):
    return tiny_lm("llama")


@pytest.fixture
def models(lm, with_random_gate, tmp_path) -> dict[str, ProxyModelForCausalLM]:
    """Over one LM, a model of each kind with a second proxy, `other`."""
    made = {}
    for i, (kind, settings) in enumerate(KINDS.items()):
        config = ProxyConfig(**SMALL, **settings)
        with_random_gate(lm, config, seed=100 + i).save_pretrained(tmp_path / kind)
        made[kind] = with_random_gate(lm, config, seed=i)
        made[kind].load_proxy(tmp_path / kind, "other")
    return made


def at_once(calls) -> list:
    """What the calls return, each in a thread of its own, all begun together."""
    barrier = threading.Barrier(len(calls))

    def begin(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(begin, calls))


def test_every_thread_gets_what_it_gets_alone(lm, models, ragged_batch, switch_often):
    def generating(model, lengths, **options):
        batch = ragged_batch(lengths, seed=len(lengths))
        return lambda: model.generate(**batch, max_new_tokens=12, **options)

    pooled = models["pooled"]
    text = ragged_batch([9, 4, 7])
    names = ["other", "default", "__base__", "other"]

    def disabled():
        with pooled.disable_proxy():
            return pooled.generate(**text, max_new_tokens=12, do_sample=False)

    def forward():
        with torch.no_grad():
            return pooled(**text).logits

    calls = [
        *(generating(models[kind], [5 + i, 9, 7][: 1 + i % 3]) for i, kind in enumerate(KINDS)),
        generating(pooled, [6, 3, 8, 5], proxy_names=names),
        generating(models["candidate"], [6, 3, 8, 5], proxy_names=names),
        generating(models["layers"], [6, 6], num_return_sequences=2),
        generating(models["prefix"], [4, 7], num_beams=2),
        generating(lm, [5, 8], do_sample=False),
        disabled,
        forward,
    ]
    alone = [call() for call in calls]
    for _ in range(2):
        for found, wanted in zip(at_once(calls), alone, strict=True):
            assert torch.equal(found, wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())


def test_another_active_proxy_is_of_the_next_call(models, ragged_batch):
    """`set_proxy` while a beam search reads the logits of `forward`, token by token."""
    model, batch = models["prefix"], ragged_batch([5, 7])
    options = {"max_new_tokens": 12, "num_beams": 2}
    first = model.generate(**batch, **options)
    model.set_proxy("other")
    other = model.generate(**batch, **options)
    assert not torch.equal(first, other)

    def set_other(input_ids, scores):
        model.set_proxy("other")
        return scores

    model.set_proxy("default")
    assert torch.equal(model.generate(**batch, **options, logits_processor=[set_other]), first)
    assert model.active_proxy == "other"


def test_a_disabled_proxy_is_so_for_its_thread(models, ragged_batch):
    model, batch = models["pooled"], ragged_batch([5, 7])
    gated = model.generate(**batch, max_new_tokens=8)
    with model.disable_proxy():
        (found,) = at_once([lambda: model.generate(**batch, max_new_tokens=8)])
        assert not torch.equal(model.generate(**batch, max_new_tokens=8), gated)
    assert torch.equal(found, gated)


def test_a_proxy_is_loaded_while_the_lm_decodes(lm, with_random_gate, ragged_batch, tmp_path, switch_often):
    """A proxy with candidate features tries the LM's cache first, and reads the LM's configuration for `generate`."""
    lm.generation_config = GenerationConfig(max_new_tokens=6, num_beams=3, eos_token_id=2, pad_token_id=0)
    wanted = lm.generate(**ragged_batch([5, 7]))
    found = at_once(
        [
            lambda: [lm.generate(**ragged_batch([5, 7])) for _ in range(10)],
            lambda: [ProxyModelForCausalLM(lm, ProxyConfig(features="candidate")) for _ in range(10)],
        ]
    )[0]
    assert all(torch.equal(x, wanted) for x in found)
