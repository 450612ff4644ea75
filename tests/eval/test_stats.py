"""Tests of `eval.stats` against scipy, statsmodels, closed forms and plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from eval.stats import (
    distinct_n,
    mean_ci,
    paired_delta,
    rate_ci,
    ratio_ci,
    sampled_kl,
    seeds_mean_ci,
    sign_test,
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


@pytest.mark.fault
def test_paired_delta_needs_equal_lengths():
    with pytest.raises(ValueError, match=r"paired by prompt: got shapes \(2,\), \(3,\)"):
        paired_delta([1, 2], [1, 2, 3])


def test_seeds_mean_ci_adds_the_errors_over_seeds_and_prompts():
    rng = np.random.default_rng(3)
    matrix = 0.3 * rng.normal(size=(4, 1)) + rng.normal(size=(4, 50))
    # Welch's interval of the difference between two means (here 0) has the same error and degrees of freedom
    welch = scipy_stats.ttest_ind(matrix.mean(1), matrix.mean(0), equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose(seeds_mean_ci(matrix), matrix.mean() + np.array([welch.low, welch.high]))


def test_seeds_mean_ci_lies_between_its_two_extremes():
    rng = np.random.default_rng(4)
    same = np.tile(rng.normal(size=200), (3, 1))  # seeds that agree: an interval over prompts
    np.testing.assert_allclose(seeds_mean_ci(same), mean_ci(same[0]), atol=0.02)
    apart = np.array([[0.0], [1.0], [3.0]]) + 1e-6 * rng.normal(
        size=(3, 200)
    )  # prompts that agree: one over three seeds
    t = scipy_stats.t.interval(0.95, 2, 4 / 3, scipy_stats.sem([0, 1, 3]))
    np.testing.assert_allclose(seeds_mean_ci(apart), t, atol=1e-4)
    assert np.ptp(seeds_mean_ci(apart, confidence=0.5)) < np.ptp(seeds_mean_ci(apart)) / 4


def test_seeds_mean_ci_at_its_edges():
    assert seeds_mean_ci([[1.0, 2.0, 4.0]]) == mean_ci([1.0, 2.0, 4.0])
    assert seeds_mean_ci([[0.5, 0.5], [0.5, 0.5]]) == [0.5, 0.5]
    assert seeds_mean_ci([[1.0], [3.0]]) == mean_ci([1.0, 3.0])
    assert seeds_mean_ci([[1.0]]) is None
    assert seeds_mean_ci([[], [], []]) is None
    assert seeds_mean_ci([[0.0, 1.0], [1.0, 0.0]]) is None  # no mean differs, and yet nothing is certain


@pytest.mark.fault
@pytest.mark.parametrize("call", [mean_ci, seeds_mean_ci, win_rate, sign_test])
def test_a_number_that_is_none_is_no_score(call):
    scores = [1.0, 2.0, np.nan]
    arguments = [[scores]] if call is seeds_mean_ci else [scores] if call is mean_ci else [scores, [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="must be finite numbers, got nan"):
        call(*arguments)


def test_ratio_ci_resamples_pairs():
    rng = np.random.default_rng(5)
    counts = rng.integers(1, 60, size=80)
    sums = counts * (1 + 0.3 * rng.normal(size=80))
    picks = rng.integers(80, size=(5000, 80))  # a plain percentile bootstrap
    expected = np.quantile(sums[picks].sum(1) / counts[picks].sum(1), [0.025, 0.975])
    np.testing.assert_allclose(ratio_ci(sums, counts), expected, atol=0.01)
    np.testing.assert_allclose(ratio_ci(sums[:9], np.full(9, 2.0)), np.array(mean_ci(sums[:9])) / 2)
    assert ratio_ci([2, 4], [1, 2]) == [2.0, 2.0]
    assert ratio_ci([2], [1]) is None


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


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ([1] * 5, 2 * 0.5**5),
        ([1, 1, 1, -1], 2 * 5 / 16),  # P(0, 1, 3 or 4 of 4)
        ([1, 1, 1, -1, 0, 0, 0, 0], 2 * 5 / 16),  # ties change nothing
        ([0, 0], 1.0),
        ([1, -1], 1.0),
    ],
)
def test_sign_test_is_exact(signs, expected):
    assert sign_test(signs, [0] * len(signs)) == pytest.approx(expected)
    assert sign_test([0] * len(signs), signs) == pytest.approx(expected)


def test_sign_test_of_outcomes_is_mcnemars():
    rng = np.random.default_rng(6)
    a, b = rng.random(60) < 0.5, rng.random(60) < 0.3
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    assert sign_test(a, b) == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert sign_test([], []) is None


def test_sampled_kl_equals_the_sum_over_the_vocabulary():
    rng = np.random.default_rng(7)
    lm = np.array([0.4, 0.3, 0.2, 0.1])
    policy = np.array([0.0, 0.7, 0.3, 0.0])  # as a gate, it leaves tokens out
    exact = 0.7 * np.log(0.7 / 0.3) + 0.3 * np.log(0.3 / 0.2)
    tokens = [rng.choice(4, p=policy, size=rng.integers(0, 20)) for _ in range(2000)]
    kl = sampled_kl([np.log(policy[row]) for row in tokens], [np.log(lm[row]) for row in tokens])
    assert kl.per_token == pytest.approx(exact, abs=0.01)
    assert kl.per_token_ci95[0] < exact < kl.per_token_ci95[1]
    written = [row for row in tokens if len(row)]
    assert kl.per_response == pytest.approx(kl.per_token * sum(map(len, written)) / len(written))
    assert kl.per_response_ci95[0] < kl.per_response < kl.per_response_ci95[1]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("policy", "lm", "message"),
    [
        ([], [], "policy_logprobs has 0 responses without a token"),
        ([[], []], [[], []], "policy_logprobs has 2 responses without a token"),
        ([[-1]], [[-1], [-2]], "policy_logprobs has 1 responses, lm_logprobs 2"),
        ([[-1], [-1, -2]], [[-1], [-2]], "policy_logprobs has 2 tokens in response 1, lm_logprobs 1"),
        ([[-1]], [[-np.inf]], "lm_logprobs must be finite numbers, got -inf"),
    ],
)
def test_sampled_kl_needs_both_log_probs_of_every_token(policy, lm, message):
    with pytest.raises(ValueError, match=message):
        sampled_kl(policy, lm)


# Coverage in simulated data. Fewer hits than this would be chance once in a thousand runs.
SIMULATIONS = 300
FEWEST = scipy_stats.binom.ppf(0.001, SIMULATIONS, 0.95)


def hits(truth, intervals) -> int:
    return sum(low <= truth <= high for low, high in intervals)


def test_mean_ci_covers():
    rng, shape = np.random.default_rng(8), (SIMULATIONS, 100)
    for truth, samples in ((0, rng.normal(size=shape)), (1, rng.exponential(size=shape))):
        assert hits(truth, [mean_ci(sample, n_resamples=999) for sample in samples]) >= FEWEST


@pytest.mark.parametrize(("p_win", "p_tie"), [(0.5, 0.0), (0.9, 0.05), (0.3, 0.4)])
def test_win_rates_interval_covers(p_win, p_tie):
    rng = np.random.default_rng(9)
    signs = rng.choice([1, 0, -1], p=[p_win, p_tie, 1 - p_win - p_tie], size=(SIMULATIONS, 60))
    assert hits(p_win + p_tie / 2, [win_rate(row, np.zeros(60)).ci95 for row in signs]) >= FEWEST


@pytest.mark.parametrize("seed_std", [0.0, 0.05, 1.0])  # that of trained proxies is 0.04, in standard deviations
@pytest.mark.parametrize("n_seeds", [3, 5])
def test_seeds_mean_ci_covers(n_seeds, seed_std):
    rng = np.random.default_rng(10)
    matrices = [
        seed_std * rng.normal(size=(n_seeds, 1)) + 0.64 * rng.normal(size=100) + 0.52 * rng.normal(size=(n_seeds, 100))
        for _ in range(SIMULATIONS)
    ]
    assert hits(0, [seeds_mean_ci(matrix) for matrix in matrices]) >= FEWEST
    if seed_std == 1.0:  # over prompts alone, the interval knows nothing of the seeds
        means = (matrix.mean(0) for matrix in matrices)
        assert hits(0, [scipy_stats.t.interval(0.95, 99, m.mean(), scipy_stats.sem(m)) for m in means]) < 100


def test_distinct_n():
    assert distinct_n(["a b a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct_n(["a b", "A B", "b a"], 2) == 2 / 3  # over all texts, in any case
    assert distinct_n(["word", ""], 2) is None


def test_top_ngram_share_counts_texts():
    texts = ["i am sorry but no", "I am sorry but yes", "here you are then", "go go go go go go go"]
    assert top_ngram_share(texts, 4) == 0.5  # the repeated one stands in one text alone
    assert top_ngram_share(["too short"], 4) is None
