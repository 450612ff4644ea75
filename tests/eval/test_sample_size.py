"""Tests of `eval.sample_size`: the number is the smallest one that the interval's own formula lets pass."""

import numpy as np
import pytest
from scipy.stats import norm, t
from statsmodels.stats.proportion import samplesize_confint_proportion

from eval.sample_size import prompts_for_mean, prompts_for_rate
from eval.stats import mean_ci, rate_ci


@pytest.mark.parametrize("half_width", [0.03, 0.1, 0.5, 2.0])
def test_prompts_for_a_mean(half_width):
    rng = np.random.default_rng(0)
    baseline = rng.normal(size=50)
    values = baseline + rng.normal(0.3, 0.8, size=50)
    n = prompts_for_mean(values, baseline, half_width)
    std = np.std(values - baseline, ddof=1)

    def reaches(n):
        return t.ppf(0.975, n - 1) * std / np.sqrt(n)

    assert reaches(n) <= half_width < reaches(n - 1)
    if n > 200:  # Student's t is the normal distribution
        assert n == pytest.approx((norm.ppf(0.975) * std / half_width) ** 2, rel=0.02)


def test_a_pilots_answer_holds_for_the_evaluation():
    rng = np.random.default_rng(1)
    n = prompts_for_mean(rng.normal(0, 1, size=200), np.zeros(200), 0.1)
    assert np.ptp(mean_ci(rng.normal(0, 1, size=n))) / 2 == pytest.approx(0.1, rel=0.12)  # the pilot knows std to 10 %


@pytest.mark.parametrize(("rate", "half_width"), [(0.5, 0.05), (0.7, 0.02), (0.0, 0.05), (1.0, 0.01), (0.5, 0.6)])
def test_prompts_for_a_rate(rate, half_width):
    n = prompts_for_rate(rate, half_width)
    assert np.ptp(rate_ci(rate * n, n)) / 2 <= half_width
    assert n == 2 or np.ptp(rate_ci(rate * (n - 1), n - 1)) / 2 > half_width
    if 0 < rate < 1 and n > 300:
        assert n == pytest.approx(samplesize_confint_proportion(rate, half_width), rel=0.02)


def test_more_confidence_asks_for_more_prompts():
    assert prompts_for_rate(0.5, 0.05) == 381
    assert prompts_for_rate(0.5, 0.05, confidence=0.99) == 657
    assert prompts_for_mean([0, 1], [0, 0], 0.1) < prompts_for_mean([0, 1], [0, 0], 0.1, confidence=0.99)
    assert prompts_for_mean([1, 1], [0, 0], 0.1) == 2  # a pilot without a spread


@pytest.mark.fault
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompts_for_mean([1], [0], 0.1), "values has 1 prompts: a pilot of at least 2"),
        (lambda: prompts_for_mean([1, 2], [0], 0.1), "must be paired by prompt"),
        (lambda: prompts_for_mean([1, 2], [0, 0], 0), "half_width must be above 0, got 0"),
        (lambda: prompts_for_mean([1, 2], [0, 0], 1e-9), "half_width 1e-09 needs more than"),
        (lambda: prompts_for_rate(70, 0.1), "rate must lie between 0 and 1, got 70"),
        (lambda: prompts_for_rate(0.5, float("nan")), "half_width must be above 0, got nan"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
