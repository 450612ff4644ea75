"""The win rate if both responses of a pair were equally long: judges like length for its own sake.

The regression of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) with its length term alone: the other
two need the difficulty of every instruction, learned from many models' verdicts, and a second method in the fit.
"""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.special import expit
from scipy.stats import norm
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM
from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

from eval.stats import Interval, paired_delta


class LengthControlledWinRate(NamedTuple):
    """`rate`: the win rate at equal length; `ci95`: its interval; `length_effect`: log-odds of a win per unit of
    `tanh(difference / standard deviation of the differences)`, above 0 if the longer response wins."""

    rate: float
    ci95: Interval
    length_effect: float


def length_controlled_win_rate(wins, lengths, baseline_lengths) -> LengthControlledWinRate | None:
    """Logistic regression of the wins on the difference in length, evaluated at a difference of zero.

    `P(win) = sigmoid(a + b * tanh(difference / sd))`, and the rate is `sigmoid(a)`. The interval is Wald's for `a`,
    carried over to the rate. It treats a tie as a coin flip, as the Wilson interval of `win_rate` does.

    Two extra ties, spread evenly over the pairs, keep the fit finite. Without them the likelihood has no maximum if a
    policy wins every pair, or exactly the pairs in which it is longer. They pull the rate towards 1/2, by at most
    2 / (n + 2) of the way. The interval is wide with few pairs, or if one side is longer in almost all of them.

    Args:
        wins: 1 for a win, 0.5 for a tie, 0 for a loss, or a judge's probability of a win; shape (n,).
        lengths, baseline_lengths: of the two responses of every pair, in one unit (characters in AlpacaEval; tokens,
            words); shape (n,).

    Returns:
        the rate with its interval. None for fewer than three pairs (the regression has two parameters), or if all
        pairs differ by the same length, which cannot be told apart from quality. If all lengths are equal, the win
        rate itself, but for the two ties.

    Raises:
        ValueError: if the lists are not of one length, a number is not finite, or a win is not between 0 and 1.
    """
    differences, wins = paired_delta(lengths, baseline_lengths), np.asarray(wins, dtype=np.float64)
    n = len(wins)
    if wins.shape != differences.shape:
        raise ValueError(f"wins and lengths must be paired: got shapes {wins.shape}, {differences.shape}.")
    valid = (wins >= 0) & (wins <= 1)  # a NaN is not
    if not valid.all():
        raise ValueError(f"wins must lie between 0 and 1, got {wins[~valid][0]}: make them with win_scores.")
    if n < 3 or (np.ptp(differences) == 0 and differences[0] != 0):
        return None
    # Divided by the spread but not centred, as in AlpacaEval's code: zero must still mean equal lengths.
    scale = differences.std(ddof=1) or 1.0
    design = np.column_stack([np.ones(n), np.tanh(differences / scale)])
    if not differences.any():
        design = design[:, :1]
    extra = 2 / n  # ties per pair
    model = GLM((wins + extra / 2) / (1 + extra), design, family=Binomial(), freq_weights=np.full(n, 1 + extra))
    with warnings.catch_warnings():
        # statsmodels warns of a separation if a fit meets every observation; the ties rule one out.
        warnings.simplefilter("ignore", PerfectSeparationWarning)
        result = model.fit()
    half_width = norm.ppf(0.975) * result.bse[0]
    low, rate, high = expit(result.params[0] + half_width * np.array([-1, 0, 1])).tolist()
    return LengthControlledWinRate(rate, [low, high], float(result.params[1]) if differences.any() else 0.0)
