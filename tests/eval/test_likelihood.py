"""Tests of `eval.likelihood` against one row and one token at a time."""

import pytest
import torch

from eval.likelihood import likelihood
from trl_proxy import ProxyConfig

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
RESPONSES = [[20, 21, 22, 2], [23], [24, 25]]  # the first one ends with EOS


@torch.no_grad()
def brute_force_logprob(lm, prompt, response) -> float:
    total = 0.0
    for i, token in enumerate(response):
        logits = lm(torch.tensor([prompt + response[:i]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_log_probs_equal_token_by_token(tiny_lm, kind, batch_size):
    lm = tiny_lm(kind)
    expected = [brute_force_logprob(lm, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    assert likelihood(lm, PROMPTS, RESPONSES, batch_size=batch_size)[0] == pytest.approx(expected, abs=1e-4)


def test_an_empty_response_has_logprob_zero(tiny_lm):
    assert likelihood(tiny_lm(), [[5, 6], [7]], [[], [8]])[0][0] == 0.0


@torch.no_grad()
def test_kl_of_a_gated_lm_equals_the_sum_over_the_vocabulary(tiny_lm, with_random_gate):
    lm = tiny_lm()
    model = with_random_gate(lm, ProxyConfig(p_t=0.01, max_candidates=5))
    divergences = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        for i in range(len(response)):
            ids = torch.tensor([prompt + response[:i]])
            policy, reference = model(ids).logits[0, -1].double(), lm(ids).logits[0, -1].double()
            p, q = policy.softmax(-1), reference.softmax(-1)
            divergences.append(sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True) if a > 0))
    expected = sum(divergences) / len(divergences)
    assert expected > 0.1
    forwards = []
    handle = lm.register_forward_hook(lambda *_: forwards.append(1))
    sums, divergence = likelihood(lm, PROMPTS, RESPONSES, policy_lm=model, batch_size=2)
    handle.remove()
    assert divergence == pytest.approx(expected, abs=1e-4)
    assert sums == pytest.approx(likelihood(lm, PROMPTS, RESPONSES)[0], abs=1e-4)
    assert len(forwards) == -(-len(PROMPTS) // 2)  # the LM runs once for both


def test_kl_to_itself_is_zero_and_to_another_is_not(tiny_lm):
    lm = tiny_lm()
    assert likelihood(lm, PROMPTS, RESPONSES)[1] is None
    assert likelihood(lm, PROMPTS, RESPONSES, policy_lm=lm)[1] == 0.0
    assert likelihood(lm, PROMPTS, RESPONSES, policy_lm=tiny_lm())[1] == pytest.approx(0.0, abs=1e-6)
    assert likelihood(lm, PROMPTS, RESPONSES, policy_lm=tiny_lm(seed=1))[1] > 0.1


@pytest.mark.fault
def test_logits_that_are_no_numbers_are_no_likelihood(tiny_lm):
    lm = tiny_lm()
    lm.get_output_embeddings().weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="The LM's logits are NaN for 3 of 3 responses: load it in float32"):
        likelihood(lm, PROMPTS, RESPONSES)
