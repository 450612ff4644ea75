"""Tests of `eval.length_control` against statsmodels, a plain Newton iteration and judges of known taste."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.special import expit
from scipy.stats import binom

from eval.length_control import length_controlled_win_rate
from eval.stats import rate_ci


def judged(rng, n, quality, taste, longer, ties=0.0):
    """Verdicts of a judge who likes quality and length, `P(win) = sigmoid(quality + taste * tanh(difference))`, with
    differences in hundreds of characters, `longer` on average; a share of the pairs is tied."""
    differences = rng.normal(longer, 1, size=n)
    wins = (rng.random(n) < expit(quality + taste * np.tanh(differences))).astype(float)
    wins[rng.random(n) < ties] = 0.5
    return wins, 300 + 100 * differences, np.full(n, 300.0)


def test_it_is_the_intercept_of_a_logistic_regression_with_two_more_ties():
    wins, lengths, baseline = judged(np.random.default_rng(0), 60, 0.4, 1.5, 0.7, ties=0.2)
    x = np.tanh((lengths - baseline) / (lengths - baseline).std(ddof=1))
    # Newton's method on the 60 pairs and 60 ties of weight 2/60
    X, y, w = np.column_stack([np.ones(120), [*x, *x]]), np.array([*wins, *[0.5] * 60]), np.repeat([1, 2 / 60], 60)
    beta = np.zeros(2)
    for _ in range(20):
        p = expit(X @ beta)
        information = X.T @ (X * (w * p * (1 - p))[:, None])
        beta += np.linalg.solve(information, X.T @ (w * (y - p)))
    half = 1.959964 * np.sqrt(np.linalg.inv(information)[0, 0])
    result = length_controlled_win_rate(wins, lengths, baseline)
    assert result.rate == pytest.approx(expit(beta[0]), abs=1e-6)
    assert result.length_effect == pytest.approx(beta[1], abs=1e-5)
    assert result.ci95 == pytest.approx(expit(beta[0] + np.array([-half, half])), abs=1e-6)


def test_the_two_ties_change_little():
    wins, lengths, baseline = judged(np.random.default_rng(1), 256, 0.4, 1.5, 0.7)
    x = np.tanh((lengths - baseline) / (lengths - baseline).std(ddof=1))
    plain = sm.Logit(wins, sm.add_constant(x)).fit(disp=False)
    result = length_controlled_win_rate(wins, lengths, baseline)
    assert result.rate == pytest.approx(expit(plain.params[0]), abs=0.005)
    assert result.ci95 == pytest.approx(expit(plain.conf_int()[0]), abs=0.01)


def test_swapping_the_sides_swaps_the_rate_and_the_unit_does_not_matter():
    wins, lengths, baseline = judged(np.random.default_rng(2), 40, 1.0, 1.0, 0.5, ties=0.1)
    result = length_controlled_win_rate(wins, lengths, baseline)
    swapped = length_controlled_win_rate(1 - wins, baseline, lengths)
    assert swapped.rate == pytest.approx(1 - result.rate)
    assert swapped.ci95 == pytest.approx([1 - result.ci95[1], 1 - result.ci95[0]])
    assert swapped.length_effect == pytest.approx(result.length_effect)
    tokens = length_controlled_win_rate(wins, lengths / 4, baseline / 4)
    assert (tokens.rate, *tokens.ci95) == pytest.approx((result.rate, *result.ci95))


LENGTHS = np.array([-3.0, -2, -1, 1, 2, 3] * 4)  # 24 pairs


@pytest.mark.parametrize(
    ("wins", "differences", "rate", "inside"),
    [
        ("longer", LENGTHS, 0.5, [0.1, 0.9]),  # length separates wins from losses: no likelihood has a maximum here
        ("all", LENGTHS, 25 / 26, [0.74, 1]),
        ("none", LENGTHS, 1 / 26, [0, 0.26]),
        ("all", 0 * LENGTHS, 25 / 26, [0.77, 1]),  # nothing to control for: the win rate and two ties
        ("half", 0 * LENGTHS, 0.5, [0.3, 0.7]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_extremes_have_a_finite_answer(wins, differences, rate, inside):
    wins = {"longer": differences > 0, "all": np.ones(24), "none": np.zeros(24), "half": np.arange(24) % 2}[wins]
    result = length_controlled_win_rate(wins, 10 + differences, np.full(24, 10))
    assert result.rate == pytest.approx(rate, abs=1e-6)
    assert inside[0] < result.ci95[0] < rate < result.ci95[1] < inside[1]
    assert result.ci95[1] - result.ci95[0] > 0.1


def test_what_cannot_be_told_is_none():
    assert length_controlled_win_rate([], [], []) is None
    assert length_controlled_win_rate([1, 0], [5, 9], [7, 7]) is None
    assert length_controlled_win_rate([1, 0, 1], [9, 8, 7], [4, 3, 2]) is None  # always 5 longer
    low, high = length_controlled_win_rate([1, 0, 1], [9, 8, 7], [4, 3, 1]).ci95
    assert high - low > 0.7  # three pairs


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 0, 1], [1, 2, 3], [1, 2]), r"paired by prompt: got shapes \(3,\), \(2,\)"),
        (([1, 0], [1, 2, 3], [1, 2, 4]), r"wins and lengths must be paired: got shapes \(2,\), \(3,\)"),
        (([1, 0, 2], [1, 2, 3], [1, 2, 4]), "wins must lie between 0 and 1, got 2.0"),
        (([1, 0, np.nan], [1, 2, 3], [1, 2, 4]), "wins must lie between 0 and 1, got nan"),
        (([1, 0, 1], [1, 2, np.inf], [1, 2, 4]), "must be finite numbers, got inf"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(*arguments)


@pytest.mark.parametrize(("quality", "longer", "ties"), [(0.0, 1.0, 0.0), (-0.5, 1.0, 0.2), (0.5, -1.0, 0.0)])
def test_a_judge_who_likes_length_misleads_the_plain_win_rate_alone(quality, longer, ties):
    rng, n, simulations = np.random.default_rng(0), 120, 300
    truth = (1 - ties) * expit(quality) + ties / 2
    covered, covered_plain, rates, plain_rates = 0, 0, [], []
    for _ in range(simulations):
        wins, lengths, baseline = judged(rng, n, quality, 2.0, longer, ties)
        result, plain = length_controlled_win_rate(wins, lengths, baseline), rate_ci(wins.sum(), n)
        covered += result.ci95[0] <= truth <= result.ci95[1]
        covered_plain += plain[0] <= truth <= plain[1]
        rates.append(result.rate)
        plain_rates.append(wins.mean())
    assert covered >= binom.ppf(0.001, simulations, 0.95)  # fewer would be chance once in a thousand runs
    assert covered_plain < simulations / 10
    assert abs(np.mean(rates) - truth) < 0.02
    assert abs(np.mean(plain_rates) - truth) > 0.15
