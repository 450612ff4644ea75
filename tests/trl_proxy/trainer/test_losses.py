"""PPO's losses against loops in float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from trl_proxy.trainer.losses import approx_kl, clip_fraction, clipped_policy_loss, clipped_value_loss, masked_mean


@settings(max_examples=40)
@given(
    rows=st.integers(1, 4),
    steps=st.integers(1, 6),
    low=st.floats(0.05, 0.5),
    high=st.floats(0.05, 0.5),
    seed=st.integers(0, 1000),
)
def test_losses_equal_naive_loops(rows, steps, low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    new, old, advantages, values, old_values, returns = torch.randn(
        6, rows, steps, generator=generator, dtype=torch.float64
    )
    mask = torch.rand(rows, steps, generator=generator) < 0.7
    policy, value, kl, clipped, n = 0.0, 0.0, 0.0, 0.0, 0
    for i in range(rows):
        for t in range(steps):
            if not mask[i, t]:
                continue
            n += 1
            ratio = float((new[i, t] - old[i, t]).exp())
            a = float(advantages[i, t])
            policy -= min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            near = old_values[i, t] + max(-0.2, min(0.2, float(values[i, t] - old_values[i, t])))
            value += 0.5 * max(float(values[i, t] - returns[i, t]) ** 2, float(near - returns[i, t]) ** 2)
            kl += ratio - 1 - float(new[i, t] - old[i, t])
            clipped += ratio < 1 - low or ratio > 1 + high
    n = max(n, 1)
    for got, expected in (
        (clipped_policy_loss(new, old, advantages, mask, low, high), policy / n),
        (clipped_value_loss(values, old_values, returns, mask, 0.2), value / n),
        (approx_kl(new, old, mask), kl / n),
        (clip_fraction(new, old, mask, low, high), clipped / n),
    ):
        assert float(got) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_the_edges_of_the_clip_range_are_inside():
    ratios = torch.tensor([[0.5, 0.75, 1.0, 1.25, 1.5]], dtype=torch.float64)
    found = clip_fraction(ratios.log(), torch.zeros(1, 5).double(), torch.ones(1, 5).bool(), 0.5, 0.5)
    assert found == 0.0
    assert clip_fraction(ratios.log(), torch.zeros(1, 5).double(), torch.ones(1, 5).bool(), 0.25, 0.25) == 0.4


def test_steps_outside_the_mask_may_be_anything():
    """Padding has no number that means something, and must not reach a gradient."""
    mask = torch.tensor([[True, False]])
    log_probs, old = torch.tensor([[0.1, 400.0]], requires_grad=True), torch.tensor([[0.0, -400.0]])
    loss = clipped_policy_loss(log_probs, old, torch.tensor([[1.0, 0.0]]), mask, 0.2, 0.2)
    loss = loss + approx_kl(log_probs, old, mask)
    loss.backward()
    assert loss.isfinite()
    assert log_probs.grad.isfinite().all()
    assert clip_fraction(log_probs, old, mask, 0.2, 0.2) == 0.0


def test_no_step_is_no_gradient():
    log_probs = torch.randn(2, 3, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = clipped_policy_loss(log_probs, torch.zeros(2, 3), torch.ones(2, 3), mask, 0.2, 0.2)
    loss.backward()
    assert loss.item() == 0.0
    assert log_probs.grad.abs().sum() == 0.0
    assert masked_mean(torch.ones(2, 3), mask) == 0.0
