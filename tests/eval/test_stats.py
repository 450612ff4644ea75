"""Tests of `eval.stats` against scipy, statsmodels, closed forms and plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.proportion import proportion_confint

from eval.stats import (
    distinct_n,
    mean_ci,
    paired_delta,
    paired_delta_ci,
    rate_ci,
    seeds_mean_ci,
    top_ngram_share,
    win_rate,
    win_scores,
)


def test_mean_ci_is_scipys_bca_bootstrap():
    values = np.random.default_rng(1).exponential(size=60)
    expected = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="BCa", batch=1000, rng=np.random.default_rng(7)
    ).confidence_interval
    assert mean_ci(values, seed=7) == [expected.low, expected.high]


def test_mean_ci_is_close_to_the_t_interval_of_normal_data():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    t = scipy_stats.t.interval(0.95, 399, values.mean(), scipy_stats.sem(values))
    np.testing.assert_allclose(mean_ci(values), t, atol=0.02)


def test_mean_ci_without_a_spread_or_without_data():
    assert mean_ci([0.25] * 5) == [0.25, 0.25]
    assert mean_ci([1.0]) is None
    assert mean_ci([]) is None


@given(
    st.lists(st.floats(-5, 5, width=16), min_size=3, max_size=12).filter(lambda v: np.ptp(v) > 0.1),
    st.sampled_from([-8.0, 0.5, 64.0]),
)
def test_mean_ci_moves_with_its_data(values, shift):
    before = mean_ci(values, n_resamples=200)
    np.testing.assert_allclose(mean_ci(np.array(values) + shift, n_resamples=200), np.array(before) + shift, atol=1e-6)


def test_paired_delta_ci_resamples_pairs():
    values, baseline = np.array([1.0, 5.0, 9.0, 2.0]), np.array([0.0, 4.5, 8.0, 0.0])
    assert paired_delta(values, baseline).tolist() == [1.0, 0.5, 1.0, 2.0]
    assert paired_delta_ci(values, baseline) == mean_ci([1.0, 0.5, 1.0, 2.0])
    # the spread between prompts, which both share, is gone
    assert np.ptp(paired_delta_ci(values, baseline)) < np.ptp(mean_ci(values)) / 3


def test_paired_delta_needs_equal_lengths():
    with pytest.raises(ValueError, match=r"paired by prompt: got shapes \(2,\), \(3,\)"):
        paired_delta([1, 2], [1, 2, 3])


def test_seeds_mean_ci_resamples_seeds_and_prompts():
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(4, 1)) + rng.normal(size=(4, 50))
    # a plain loop over both resamplings
    means = [matrix[np.ix_(rng.integers(4, size=4), rng.integers(50, size=50))].mean() for _ in range(5000)]
    np.testing.assert_allclose(seeds_mean_ci(matrix), np.quantile(means, [0.025, 0.975]), atol=0.06)
    # seeds that differ make the interval wider than prompts alone do
    assert np.ptp(seeds_mean_ci(matrix)) > 1.5 * np.ptp(mean_ci(matrix.mean(0)))
    assert seeds_mean_ci(matrix, seed=5) == seeds_mean_ci(matrix, seed=5)


def test_seeds_mean_ci_at_its_edges():
    assert seeds_mean_ci([[1.0, 2.0, 4.0]]) == mean_ci([1.0, 2.0, 4.0])
    assert seeds_mean_ci([[0.5, 0.5], [0.5, 0.5]]) == [0.5, 0.5]
    assert seeds_mean_ci([[1.0], [3.0]]) == mean_ci([1.0, 3.0])
    assert seeds_mean_ci([[1.0]]) is None


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (5, 10), (10, 10), (61.5, 100)])
def test_rate_ci_is_wilsons(wins, n):
    assert rate_ci(wins, n) == pytest.approx(proportion_confint(wins, n, alpha=0.05, method="wilson"))
    z = scipy_stats.norm.ppf(0.975)
    p = wins / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert rate_ci(wins, n) == pytest.approx([max(center - half, 0), min(center + half, 1)], abs=1e-9)


def test_rate_ci_of_nothing():
    assert rate_ci(0, 0) is None


def test_win_rate_counts_a_tie_half():
    assert win_scores([1, 2, 3, 4], [0, 2, 5, 4]).tolist() == [1, 0.5, 0, 0.5]
    result = win_rate([1, 2, 3, 4], [0, 2, 5, 4])
    assert (result.rate, result.tie_rate) == (0.5, 0.5)
    assert result.ci95 == rate_ci(2, 4)
    assert win_rate([], []) is None


def test_distinct_n():
    assert distinct_n(["a b a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct_n(["a b", "A B", "b a"], 2) == 2 / 3  # over all texts, in any case
    assert distinct_n(["word", ""], 2) is None


def test_top_ngram_share_counts_texts():
    texts = ["i am sorry but no", "I am sorry but yes", "here you are then", "go go go go go go go"]
    assert top_ngram_share(texts, 4) == 0.5  # the repeated one stands in one text alone
    assert top_ngram_share(["too short"], 4) is None
