"""Tests of trl_proxy/gate.py: the MLP, greedy and sampled decisions, and the closed form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trl_proxy.core.gate import ProxyMLP, accepted_rank, decide, gated_log_probs, is_last


@st.composite
def positions_of(draw):
    """Accept logits `(rows, K)` in float64 and their mask, real candidates first and at least one."""
    rows, k = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scales = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, 5.0, 100.0, 1e4]), min_size=k, max_size=k)))
    logits = torch.randn(rows, k, generator=generator, dtype=torch.float64) * scales
    counts = torch.randint(1, k + 1, (rows, 1), generator=generator)
    return logits, torch.arange(k) < counts


def sequential_log_probs(logits: list[float]) -> list[torch.Tensor]:
    """Log-probability that deciding in sequence ends at each candidate: a sum of Bernoulli log-probs."""
    out = []
    for k in range(len(logits)):
        asked = torch.stack(list(logits[: min(k + 1, len(logits) - 1)])) if len(logits) > 1 else None
        if asked is None:
            out.append(torch.zeros((), dtype=torch.float64))
            continue
        actions = torch.tensor([float(j == k) for j in range(len(asked))], dtype=torch.float64)
        out.append(torch.distributions.Bernoulli(logits=asked).log_prob(actions).sum())
    return out


@given(positions=positions_of())
@settings(max_examples=150)
def test_closed_form_equals_deciding_in_sequence(positions):
    logits, mask = positions
    found = gated_log_probs(logits, mask)
    assert not found.isnan().any()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(logits), dtype=torch.float64))
    assert (found[~mask] == -torch.inf).all()
    for row in range(len(logits)):
        expected = torch.stack(sequential_log_probs(logits[row][mask[row]]))
        torch.testing.assert_close(found[row][mask[row]], expected, rtol=1e-9, atol=1e-9)


@given(positions=positions_of())
@settings(max_examples=150)
def test_closed_form_in_float32(positions):
    """A gate sure of itself (logits far from zero) must not lose the other probabilities to cancellation."""
    logits, mask = positions
    found = gated_log_probs(logits.float(), mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(logits)), atol=1e-5, rtol=0)
    exact = gated_log_probs(logits.float().double(), mask)
    torch.testing.assert_close(found.double().exp(), exact.exp(), atol=1e-5, rtol=0)


def test_closed_form_by_hand():
    a = torch.tensor([0.5, 0.25, 0.9, 0.1])
    found = gated_log_probs(a.logit().expand(3, -1), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool())
    expected = torch.tensor([[0.5, 0.125, 0.375 * 0.9, 0.375 * 0.1], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found.exp(), expected)


def test_a_sure_gate_keeps_the_other_probabilities():
    """a = (0.4, almost 0 three times, forced): what the first leaves is the last one's."""
    found = gated_log_probs(torch.tensor([[-0.405465, -3e4, -3e4, -3e4, 0.0]]), torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(found[0, [0, 4]].exp(), torch.tensor([0.4, 0.6]), atol=1e-5, rtol=0)
    found = gated_log_probs(torch.tensor([[-0.405465, 3e4, 1.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(found[0, :2].exp(), torch.tensor([0.4, 0.6]), atol=1e-5, rtol=0)


@given(positions=positions_of())
@settings(max_examples=60)
def test_gradient_equals_that_of_the_decisions(positions):
    """d log pi(c_k) / d logits, for every k, in float64; forced and masked candidates carry none."""
    logits, mask = positions
    for row in range(len(logits)):
        count = int(mask[row].sum())
        for k in range(count):
            ours = logits[row : row + 1].clone().requires_grad_()
            gated_log_probs(ours, mask[row : row + 1])[0, k].backward()
            theirs = logits[row, :count].clone().requires_grad_()
            value = sequential_log_probs(list(theirs))[k]
            if value.requires_grad:
                value.backward()
            expected = torch.zeros_like(logits[row])
            expected[:count] = theirs.grad if theirs.grad is not None else 0.0
            torch.testing.assert_close(ours.grad[0], expected, atol=1e-9, rtol=1e-9)
            assert ours.grad[0, count - 1] == 0.0


def test_gradient_of_an_entropy_has_no_nan():
    logits = torch.randn(4, 6, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[1], [2], [5], [6]])
    log_probs = gated_log_probs(logits, mask)
    entropy = -(log_probs.exp() * log_probs.masked_fill(~mask, 0.0)).sum()
    entropy.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[~mask].abs().sum() == 0.0


def test_greedy_decisions():
    logits = torch.tensor([-1.0, -1e-6, 0.0, 0.5, 2.0])
    assert decide(logits, 0.0, False).tolist() == [False, False, True, True, True]
    assert decide(logits, 0.5, False).tolist() == [False, False, False, True, True]
    assert decide(logits, -1.0, False).tolist() == [True] * 5


@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_sampled_decisions_follow_the_sigmoid(threshold):
    torch.manual_seed(1)
    n, logits = 20_000, torch.tensor([-2.0, 0.0, 1.0])
    accepted = decide(logits.expand(n, -1), threshold, True).sum(0)
    for logit, count in zip(logits, accepted.tolist(), strict=True):
        p = torch.sigmoid(logit - threshold).item()
        assert stats.binomtest(count, n, p).pvalue > 1e-3


def test_last_candidate_and_accepted_rank():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    assert is_last(mask).int().tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    accept = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()
    assert accepted_rank(accept, mask).tolist() == [1, 1, 0, 2, 0]


def test_mlp_by_hand(brute_force):
    """LayerNorm of each part by itself, standardised, ReLU between the layers, scalars as they are."""
    mlp = ProxyMLP([6, 4], 3, [8, 5], bias=0.5)
    mlp.standardise(torch.randn(10), torch.rand(10) + 0.1)
    torch.nn.init.normal_(mlp.mlp[-1].weight)
    features = torch.randn(10, 13)
    expected = [brute_force.gate_logit(mlp, [f[:6], f[6:10]], f[10:].tolist()) for f in features]
    torch.testing.assert_close(mlp(features), torch.tensor(expected))
    scaled = features.clone()
    scaled[:, :6] = features[:, :6] * 100 + 7
    torch.testing.assert_close(mlp(scaled), mlp(features), atol=1e-4, rtol=0)
    assert mlp(features.view(2, 5, 13)).shape == (2, 5)


@pytest.mark.parametrize(("parts", "scalars"), [([64], 0), ([64, 32], 5)])
def test_a_new_network_returns_its_bias(parts, scalars):
    mlp = ProxyMLP(parts, scalars, [16], bias=1.5)
    assert torch.equal(mlp(torch.randn(50, sum(parts) + scalars) * 100), torch.full((50,), 1.5))


def test_a_feature_that_never_varies_is_not_blown_up():
    mlp = ProxyMLP([4], 0, [8], bias=0.0)
    torch.nn.init.normal_(mlp.mlp[-1].weight)
    mlp.standardise(torch.ones(4), torch.tensor([0.0, 1e-4, 1e-3, 2.0]))
    assert mlp.feature_std.tolist() == pytest.approx([1e-3, 1e-3, 1e-3, 2.0])
    assert mlp.feature_mean.tolist() == [1.0] * 4
    assert mlp(torch.randn(3, 4)).isfinite().all()


def test_a_network_is_new_until_it_has_moments_or_has_learned():
    fresh, standardised, trained = (ProxyMLP([4], 0, [8], bias=0.5) for _ in range(3))
    standardised.standardise(torch.full((4,), 0.5), torch.ones(4))
    trained.mlp[-1].weight.data[0, 3] = 1e-6
    assert [network.is_new for network in (fresh, standardised, trained)] == [True, False, False]


def test_mlp_stays_in_float32():
    """bfloat16 features and autocast leave the accept logits, and so PPO's ratios, in float32."""
    mlp = ProxyMLP([64], 0, [16], bias=0.0)
    torch.nn.init.normal_(mlp.mlp[-1].weight)
    features = torch.randn(8, 64).bfloat16()
    expected = mlp(features.float())
    assert torch.equal(mlp(features), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mlp(features)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
