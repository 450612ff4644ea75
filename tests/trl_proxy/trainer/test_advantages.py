"""GAE against the definition, in float64, on ragged masks."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from trl_proxy.trainer.advantages import gae, step_rewards


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


def naive_step_rewards(scores, positions, mask, every):
    """Row by row: the score of what is written when the next step is taken, less the score at this one."""
    rewards = torch.zeros(mask.shape, dtype=scores.dtype)
    for row in range(len(mask)):

        def score(tokens, row=row):
            return scores[row, tokens // every - 1] if tokens >= every else 0.0

        steps = mask[row].nonzero()[:, 0].tolist()
        for t, following in zip(steps, [*steps[1:], None]):
            after = scores[row, -1] if following is None else score(positions[row, following].item())
            rewards[row, t] = after - score(positions[row, t].item())
    return rewards


@settings(max_examples=40)
@given(rows=st.integers(1, 4), steps=st.integers(1, 9), every=st.integers(1, 5), seed=st.integers(0, 1000))
def test_step_rewards_equal_the_naive_loop(rows, steps, every, seed):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 12, (rows, steps), generator=generator).sort(-1).values
    mask = torch.arange(steps) < torch.randint(0, steps + 1, (rows, 1), generator=generator)
    scores = torch.randn(rows, 11 // every + 1, generator=generator, dtype=torch.float64)
    rewards = step_rewards(scores, positions, mask, every)
    torch.testing.assert_close(rewards, naive_step_rewards(scores, positions, mask, every), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [([[True, True, False]], [[0.0, 5.0, 0.0]]), ([[False, False, False]], [[0.0, 0.0, 0.0]])],
)
def test_a_single_score_comes_at_the_last_decision(mask, expected):
    positions = torch.tensor([[0, 4, 0]])
    assert step_rewards(torch.tensor([[5.0]]), positions, torch.tensor(mask), 8).tolist() == expected


def test_scores_on_the_way_are_paid_where_they_arise():
    scores = torch.tensor([[1.0, -2.0, 3.0]])  # after 4 tokens, after 8, and of the finished response
    positions = torch.tensor([[0, 0, 3, 9, 10]])
    rewards = step_rewards(scores, positions, torch.ones(1, 5, dtype=torch.bool), 4)
    assert rewards.tolist() == [[0.0, 0.0, -2.0, 0.0, 5.0]]
