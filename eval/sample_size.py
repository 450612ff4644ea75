"""How many prompts an evaluation needs for an interval of a wanted width: asked before it runs, not after."""

from bisect import bisect_left

import numpy as np
from scipy.stats import t

from eval.stats import paired_delta, rate_ci

MOST_PROMPTS = 10**9  # beyond it the wish is called impossible


def _smallest(half_width_of, half_width: float) -> int:
    """Smallest n of at least 2 whose half-width, which falls with n, is at most the wanted one."""
    if not half_width > 0:
        raise ValueError(f"half_width must be above 0, got {half_width}: say how far the interval may reach.")
    n = bisect_left(range(MOST_PROMPTS), True, lo=2, key=lambda n: half_width_of(n) <= half_width)
    if n == MOST_PROMPTS:
        raise ValueError(f"half_width {half_width} needs more than {MOST_PROMPTS} prompts: ask for a wider interval.")
    return n


def prompts_for_mean(values, baseline, half_width: float, *, confidence: float = 0.95) -> int:
    """Prompts for an interval of the mean paired difference that reaches `half_width` to either side.

    From Student's t and the standard deviation of a pilot's differences: as uncertain as that is (30 prompts know it
    to about a quarter, so n to about a half). More prompts do not narrow what differs between training seeds.

    Args:
        values, baseline: the pilot's scores, paired by prompt, shape (n,); zeros as the baseline for a plain mean.
        half_width: in the scores' unit.
        confidence: coverage, between 0 and 1.

    Returns:
        the smallest number of prompts, at least 2.

    Raises:
        ValueError: if the pilot has fewer than two pairs, unequal lengths or numbers that are not finite, or the width
            is not above 0 or out of reach.
    """
    differences = paired_delta(values, baseline)
    if len(differences) < 2:
        raise ValueError(f"values has {len(differences)} prompts: a pilot of at least 2 shows how much they differ.")
    std = differences.std(ddof=1)
    return _smallest(lambda n: t.ppf((1 + confidence) / 2, n - 1) * std / np.sqrt(n), half_width)


def prompts_for_rate(rate: float, half_width: float, *, confidence: float = 0.95) -> int:
    """Prompts for a Wilson interval of an expected rate that is at most `2 * half_width` wide.

    Args:
        rate: the expected one, e.g. of a pilot; 0.5 asks for the most prompts and is safe where nothing is known.
        half_width: half of the interval's width; the interval is not centred on the rate, least so near 0 and 1.
        confidence: coverage, between 0 and 1.

    Returns:
        the smallest number of prompts, at least 2.

    Raises:
        ValueError: if the rate is not between 0 and 1, or the width is not above 0 or out of reach.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie between 0 and 1, got {rate}: give a share of the prompts, not a percentage.")
    return _smallest(lambda n: np.ptp(rate_ci(rate * n, n, confidence=confidence)) / 2, half_width)
