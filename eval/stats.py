"""Intervals and rates of an evaluation: pure functions on lists of numbers or texts.

Intervals are 95 % unless said. One that cannot be computed (fewer than two observations) is None, never a made-up
zero-width one.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap
from statsmodels.stats.proportion import proportion_confint

Interval = list[float]  # [low, high]


class WinRate(NamedTuple):
    """`rate`: wins plus half of the ties, over all pairs; `ci95`: its Wilson interval; `tie_rate`: ties over all."""

    rate: float
    ci95: Interval
    tie_rate: float


def mean_ci(values, *, confidence: float = 0.95, n_resamples: int = 9999, seed: int = 0) -> Interval | None:
    """Bias-corrected and accelerated (BCa) bootstrap interval of the mean.

    Args:
        values: one number per prompt, shape (n,).
        confidence: coverage, between 0 and 1.
        n_resamples: bootstrap resamples.
        seed: seed of the resampling, so that a record can be recomputed to the last digit.

    Returns:
        `[low, high]`; `[v, v]` where all values are the same `v`; None for fewer than two values.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:  # BCa divides by the spread
        return [float(values[0])] * 2
    result = bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=n_resamples,
        method="BCa",
        batch=1000,  # bounds the memory to batch * n numbers
        rng=np.random.default_rng(seed),
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def paired_delta(values, baseline) -> np.ndarray:
    """Differences by prompt, shape (n,).

    Raises:
        ValueError: if the two lists are not of one length.
    """
    values, baseline = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if values.shape != baseline.shape:
        raise ValueError(f"values and baseline must be paired by prompt: got shapes {values.shape}, {baseline.shape}.")
    return values - baseline


def paired_delta_ci(values, baseline, **kwargs) -> Interval | None:
    """Bootstrap interval of the mean difference, resampling the *pairs*; arguments as `mean_ci`."""
    return mean_ci(paired_delta(values, baseline), **kwargs)


def seeds_mean_ci(matrix, *, confidence: float = 0.95, n_resamples: int = 9999, seed: int = 0) -> Interval | None:
    """Percentile bootstrap interval of the mean over training seeds *and* prompts, both resampled.

    Seed noise is as large as most differences between methods, so an interval over prompts alone would promise too
    much. With two or three seeds even this one is rather too narrow than too wide.

    Args:
        matrix: one number per seed and prompt, shape (seeds, n). One seed falls back to `mean_ci`.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if len(matrix) == 1 or matrix.shape[1] < 2:
        return mean_ci(matrix.mean(axis=1) if len(matrix) > 1 else matrix[0], confidence=confidence, seed=seed)
    if np.ptp(matrix) == 0:
        return [float(matrix[0, 0])] * 2

    def crossed_mean(seeds, prompts, axis):  # indices of shape (resamples, seeds) and (resamples, n)
        return matrix[seeds[..., :, None], prompts[..., None, :]].mean(axis=(-2, -1))

    result = bootstrap(
        (np.arange(matrix.shape[0]), np.arange(matrix.shape[1])),
        crossed_mean,
        confidence_level=confidence,
        n_resamples=n_resamples,
        method="percentile",
        vectorized=True,
        batch=200,
        rng=np.random.default_rng(seed),
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def rate_ci(successes: float, n: int, *, confidence: float = 0.95) -> Interval | None:
    """Wilson score interval of the rate `successes / n` (it stays inside [0, 1] and is no point at 0 or n)."""
    if n == 0:
        return None
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    return [float(low), float(high)]


def win_scores(values, baseline) -> np.ndarray:
    """1 where the value is above its paired baseline, 0.5 for a tie, 0 below; shape (n,)."""
    return (np.sign(paired_delta(values, baseline)) + 1) / 2


def win_rate(values, baseline) -> WinRate | None:
    """Win rate against the paired baseline, a tie counting half.

    The Wilson interval takes the half wins as they are, which treats a tie as a coin flip: with many ties it is
    wider than need be, never narrower. None for empty lists.
    """
    scores = win_scores(values, baseline)
    if len(scores) == 0:
        return None
    return WinRate(float(scores.mean()), rate_ci(scores.sum(), len(scores)), float((scores == 0.5).mean()))


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct_n(texts: list[str], n: int = 2) -> float | None:
    """Distinct n-grams of lower-cased words over all n-grams, all texts together (Li et al. 2016, arXiv 1510.03055).

    None where no text has n words. It falls as texts grow longer and more numerous: compare equal numbers of prompts.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def top_ngram_share(texts: list[str], n: int = 4) -> float | None:
    """Share of the texts that contain the n-gram found in the most texts: near 1 where a policy has one answer to all.

    None where no text has n words.
    """
    counts = Counter(ngram for text in texts for ngram in set(_ngrams(text, n)))
    return max(counts.values()) / len(texts) if counts else None
