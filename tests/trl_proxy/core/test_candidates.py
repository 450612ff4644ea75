"""Tests of trl_proxy/candidates.py: which tokens are proposed, and in which order."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from trl_proxy import ProxyConfig
from trl_proxy.core.candidates import Candidates, propose, propose_for
from trl_proxy.core.features import NUM_SCALARS, accept_logits, candidate_scalars

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@st.composite
def logits_of(draw, max_rows: int = 4):
    """Logits `(rows, vocab)` with ties, bans and every scale; as a model or a caller's processors may give them."""
    rows, vocab = draw(st.integers(1, max_rows)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, vocab, generator=generator) * draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0]))
    if draw(st.booleans()):
        logits = logits.round()  # many ties
    logits = logits.to(DTYPES[draw(st.sampled_from(list(DTYPES)))])
    banned = torch.rand(rows, vocab, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return logits.masked_fill(banned, -torch.inf)


SETTINGS = {
    "p_t": st.sampled_from([1e-4, 0.01, 0.05, 0.1, 0.5, 1.0]),
    "p_t_mode": st.sampled_from(["relative", "absolute"]),
    "max_candidates": st.integers(1, 50),
    "temperature": st.sampled_from([0.05, 0.25, 0.5, 1.0, 2.0, 10.0]),
}


@example(logits=torch.zeros(1, 21), p_t=0.05, p_t_mode="absolute", max_candidates=2, temperature=1.0)  # one candidate
@given(logits=logits_of(), **SETTINGS)
@settings(max_examples=150)
def test_ranked_equals_a_full_stable_sort(brute_force, logits, p_t, p_t_mode, max_candidates, temperature):
    """Order, ties by the lower id, truncation, at most `max_candidates`, at least one; no other token is offered."""
    config = ProxyConfig(p_t=p_t, p_t_mode=p_t_mode, max_candidates=max_candidates, temperature=temperature)
    found = propose(logits, p_t, p_t_mode, max_candidates, temperature)
    for row, row_logits in enumerate(logits.float()):
        if row_logits.isinf().all():
            continue
        token_ids, log_probs, _ = brute_force.form_candidates(row_logits, config)
        floor = math.log(p_t) + (log_probs[0] if p_t_mode == "relative" else 0.0)
        all_log_probs = (row_logits / temperature).log_softmax(-1)
        # A probability exactly at the threshold may fall on either side of it by rounding.
        assume(p_t == 1.0 or not ((all_log_probs - floor).abs() < 1e-4).any())
        if p_t == 1.0 and p_t_mode == "absolute":
            assume(all_log_probs.max() < -1e-4)
        count = int(found.counts[row])
        assert found.token_ids[row, :count].tolist() == token_ids
        torch.testing.assert_close(
            found.log_probs[row, :count], torch.tensor(log_probs), atol=1e-4, rtol=1e-5, check_dtype=False
        )


@given(logits=logits_of(), proposal=st.sampled_from(["ranked", "sampled"]), **SETTINGS)
@settings(max_examples=150)
def test_invariants(logits, proposal, p_t, p_t_mode, max_candidates, temperature):
    found = propose(logits, p_t, p_t_mode, max_candidates, temperature, proposal)
    rows, vocab = logits.shape
    k = min(max_candidates, vocab)
    assert found.token_ids.shape == found.log_probs.shape == found.mask.shape == (rows, k)
    assert (found.token_ids.dtype, found.log_probs.dtype, found.mask.dtype) == (
        torch.int64,
        torch.float32,
        torch.bool,
    )
    assert not found.log_probs.isnan().any()
    assert found.counts.min() >= 1
    assert torch.equal(found.mask, torch.arange(k) < found.counts[:, None]), "real candidates come first"
    log_probs = (logits.float() / temperature).log_softmax(-1)
    for row in range(rows):
        token_ids = found.token_ids[row][found.mask[row]]
        assert len(set(token_ids.tolist())) == len(token_ids), "no candidate twice"
        assert token_ids.min() >= 0
        assert token_ids.max() < vocab
        if logits[row].isinf().all():
            assert found.counts[row] == 1
            continue
        assert not logits[row][token_ids].isinf().any(), "a banned token is never offered"
        torch.testing.assert_close(found.log_probs[row][found.mask[row]], log_probs[row][token_ids], atol=1e-4, rtol=0)
        floor = math.log(p_t) + (log_probs[row].max() if p_t_mode == "relative" else 0.0)
        if len(token_ids) > 1:
            assert log_probs[row][token_ids].min() >= floor - 1e-4
        # What was left out is below the threshold, or there was no room for it.
        left_out = torch.ones(vocab, dtype=torch.bool).index_fill(0, token_ids, False) & ~logits[row].isinf()
        if len(token_ids) < k and left_out.any():
            assert log_probs[row][left_out].max() <= floor + 1e-4
        elif left_out.any():
            assert log_probs[row][left_out].max() <= log_probs[row][token_ids].min() + 1e-6
        if proposal == "ranked":
            assert token_ids[0] == logits[row].argmax()
            assert (found.log_probs[row][found.mask[row]].diff() <= 0).all()


def test_the_first_is_what_argmax_takes_in_bfloat16():
    """A vocabulary of realistic size, in which logits in bfloat16 tie by the dozen."""
    logits = (torch.randn(200, 5_000) * 0.05 + 8).bfloat16()
    ties = (logits == logits.amax(-1, keepdim=True)).sum(-1)
    assert ties.float().mean() > 4
    for max_candidates in (1, 2, 16):
        found = propose(logits, 0.05, "relative", max_candidates)
        assert torch.equal(found.token_ids[:, 0], logits.argmax(-1))


@pytest.mark.parametrize("vocab", [40, 5_000])
def test_ties_at_the_last_place_go_to_the_lower_ids(vocab):
    logits = torch.zeros(2, vocab)
    logits[0, 7] = 1.0
    found = propose(logits, 0.01, "relative", 4)
    assert found.token_ids.tolist() == [[7, 0, 1, 2], [0, 1, 2, 3]]


def test_relative_and_absolute_thresholds_by_hand():
    logits = torch.tensor([0.6, 0.25, 0.1, 0.05]).log()
    offered = lambda *args: propose(logits, *args).token_ids[propose(logits, *args).mask].tolist()  # noqa: E731
    assert offered(0.2, "absolute") == [0, 1]
    assert offered(0.2, "relative") == [0, 1]  # 0.12
    assert offered(0.15, "relative") == [0, 1, 2]  # 0.09
    assert offered(0.09, "absolute") == [0, 1, 2]
    assert offered(0.09, "relative") == [0, 1, 2]  # 0.054
    assert offered(0.9, "absolute") == [0], "at least one"
    assert offered(0.01, "absolute", 2) == [0, 1], "at most max_candidates"


def test_temperature_comes_before_the_truncation():
    logits = torch.tensor([0.6, 0.25, 0.1, 0.05]).log()
    assert propose(logits, 0.1, "absolute", temperature=0.5).counts == 2  # 0.82 0.14 0.02 0.01
    assert propose(logits, 0.1, "absolute", temperature=1.0).counts == 2 + 1
    assert propose(logits, 0.1, "absolute", temperature=4.0).counts == 4
    torch.testing.assert_close(
        propose(logits, 0.1, temperature=0.5).log_probs[:2].exp(), torch.tensor([0.36, 0.0625]) / 0.435
    )


def test_all_banned_still_offers_one():
    logits = torch.full((2, 10), -torch.inf)
    logits[1, 4] = 0.0
    for proposal in ("ranked", "sampled"):
        found = propose(logits, 0.1, "relative", 5, proposal=proposal)
        assert found.counts.tolist() == [1, 1]
        assert found.token_ids[1, 0] == 4
        assert found.token_ids[0, 0] == logits[0].argmax()


def test_inputs_are_left_alone():
    logits = torch.randn(3, 20)
    before = logits.clone()
    propose(logits, 0.1, "relative", 5, 0.5, "sampled")
    assert torch.equal(logits, before)


def test_sampled_draws_without_replacement_in_proportion():
    """First and second proposals against the closed form p_a and p_a * p_b / (1 - p_a) over the truncated softmax."""
    n = 20_000
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -6.0])
    found = propose(logits.expand(n, -1), 0.02, "relative", 16, proposal="sampled")
    assert (found.counts == 5).all(), "the truncation is that of the ranked proposals"
    p = logits[:5].double().softmax(-1).numpy()
    first = np.bincount(found.token_ids[:, 0], minlength=5)
    assert stats.chisquare(first, p * n).pvalue > 1e-3
    pairs = {(a, b): p[a] * p[b] / (1 - p[a]) for a in range(5) for b in range(5) if a != b}
    seen = found.token_ids[:, 0] * 5 + found.token_ids[:, 1]
    counts = np.bincount(seen, minlength=25)
    expected = np.array(list(pairs.values())) * n
    assert expected.min() > 5
    assert stats.chisquare([counts[5 * a + b] for a, b in pairs], expected).pvalue > 1e-3


def test_sampled_follows_the_seed():
    draw = lambda seed: (torch.manual_seed(seed), propose(torch.zeros(4, 30), 0.1, proposal="sampled"))[1]  # noqa: E731
    assert torch.equal(draw(1).token_ids, draw(1).token_ids)
    assert not torch.equal(draw(1).token_ids, draw(2).token_ids)


def test_any_leading_shape():
    logits = torch.randn(2, 3, 4, 20)
    found = propose(logits, 0.1, "relative", 6)
    assert found.counts.shape == (2, 3, 4)
    for index in np.ndindex(2, 3, 4):
        single = propose(logits[index], 0.1, "relative", 6)
        assert torch.equal(found.token_ids[index], single.token_ids)
        assert torch.equal(found.mask[index], single.mask)
        torch.testing.assert_close(found.log_probs[index], single.log_probs, atol=1e-6, rtol=0)


def test_scalars_by_hand():
    candidates = Candidates(
        torch.tensor([[5, 6, 7], [8, 9, 0]]),
        torch.tensor([[-0.5, -1.5, -40.0], [-0.25, -torch.inf, -torch.inf]]),
        torch.tensor([[True, True, True], [True, False, False]]),
    )
    scalars = candidate_scalars(candidates, torch.tensor([64, 5_000]))
    assert scalars.shape == (2, 3, NUM_SCALARS)
    expected = [
        [-0.5 / 4, 0.0, 0.0, 3 / 16, 0.5],
        [-1.5 / 4, 1.0 / 4, 1 / 16, 3 / 16, 0.5],
        [-20.0 / 4, 19.5 / 4, 2 / 16, 3 / 16, 0.5],
    ]
    torch.testing.assert_close(scalars[0], torch.tensor(expected))
    torch.testing.assert_close(scalars[1, 0], torch.tensor([-0.25 / 4, 0.0, 0.0, 1 / 16, 8.0]))
    assert scalars.isfinite().all()


def test_scalars_of_sampled_proposals_measure_the_gap_to_the_most_probable():
    """Under sampled proposals the first candidate need not be the most probable one."""
    candidates = Candidates(torch.tensor([[3, 4]]), torch.tensor([[-2.0, -0.5]]), torch.ones(1, 2, dtype=torch.bool))
    scalars = candidate_scalars(candidates, torch.tensor([1]))
    torch.testing.assert_close(scalars[0, :, 1], torch.tensor([1.5 / 4, 0.0]))


@pytest.mark.parametrize("p_t_mode", ["relative", "absolute"])
def test_more_dimensions_are_more_rows(p_t_mode):
    """With many ties, also at the last place, where the lowest ids are taken."""
    logits = torch.randint(3, (2, 3, 40), generator=torch.Generator().manual_seed(0)).float()
    found = propose(logits, 1e-4, p_t_mode, 5)
    flat = propose(logits.flatten(0, 1), 1e-4, p_t_mode, 5)
    for x, y in zip(found, flat, strict=True):
        assert torch.equal(x, y.view_as(x))
    assert (found.token_ids.diff(dim=-1) > 0).all()
    assert found.mask.all()


def test_logits_of_what_is_not_asked_are_zero():
    """Beyond the candidates, and at positions with one."""

    class Proxy:
        def accept_logits(self, features, rows):
            return torch.ones(len(rows))

    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    candidates = Candidates(torch.arange(9).view(3, 3), torch.zeros(3, 3), mask)
    embed, state, positions = torch.nn.Embedding(9, 2), torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
    logits = accept_logits(Proxy(), embed, state, candidates, positions)
    assert logits.tolist() == [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("proposal", ["ranked", "sampled"])
def test_a_proxy_proposes_as_its_configuration_says(proposal):
    settings = {"p_t": 0.02, "p_t_mode": "absolute", "max_candidates": 5, "temperature": 0.7, "proposal": proposal}
    logits = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    found = propose_for(ProxyConfig(**settings), logits)
    torch.manual_seed(0)
    for one, other in zip(found, propose(logits, **settings), strict=True):
        assert torch.equal(one, other)
