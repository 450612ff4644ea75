"""GAE against the definition, in float64, on ragged masks."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from trl_proxy.advantages import gae, reward_at_last_step


def naive_gae(rewards, values, mask, gamma, gae_lambda):
    """Row by row, over the steps that exist: A_t = sum_k (gamma lambda)^k delta_{t+k}."""
    advantages = torch.zeros_like(values)
    for row in range(len(values)):
        steps = mask[row].nonzero()[:, 0].tolist()
        for i, t in enumerate(steps):
            total = 0.0
            for k, u in enumerate(steps[i:]):
                after = steps[i + k + 1] if i + k + 1 < len(steps) else None
                next_value = values[row, after] if after is not None else 0.0
                delta = rewards[row, u] + gamma * next_value - values[row, u]
                total = total + (gamma * gae_lambda) ** k * delta
            advantages[row, t] = total
    return advantages


@settings(max_examples=40)
@given(
    rows=st.integers(1, 4),
    steps=st.integers(1, 9),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_gae_equals_the_naive_loop(rows, steps, gamma, gae_lambda, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, steps, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, steps, generator=generator) < 0.6
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    expected = naive_gae(rewards, values, mask, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0), rtol=0, atol=1e-12)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    rewards = torch.tensor([[0.0, 0.0, 3.0, 9.0]])
    values = torch.tensor([[1.0, -2.0, 0.5, 7.0]])
    mask = torch.tensor([[True, False, True, False]])
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    assert advantages.tolist() == [[2.0, 0.0, 2.5, 0.0]]
    assert returns.tolist() == [[3.0, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[True, True, False]], [[0.0, 5.0, 0.0]]),
        ([[False, False, False]], [[0.0, 0.0, 0.0]]),
        ([[True, False, True]], [[0.0, 0.0, 5.0]]),
    ],
)
def test_the_reward_comes_at_the_last_decision(mask, expected):
    assert reward_at_last_step(torch.tensor([5.0]), torch.tensor(mask)).tolist() == expected
