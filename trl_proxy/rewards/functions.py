"""Reward functions that need no training: sentiment, the embedded outputs by kind of prompt, repetition."""

from collections.abc import Sequence
from functools import lru_cache

from ..prompts import to_text
from .preference import KINDS, PreferenceReward


@lru_cache(maxsize=1)
def _sentiment_analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ImportError("`sentiment_reward` needs VADER; run `pip install vaderSentiment`.") from None
    return SentimentIntensityAnalyzer()


def sentiment_reward(prompts: Sequence, completions: Sequence, **kwargs) -> list[float]:
    """
    VADER's compound sentiment of each completion, in [-1, 1]: a reward without a model, for tests and first steps.

    Raises:
        ImportError: the optional package vaderSentiment is not installed.
    """
    analyzer = _sentiment_analyzer()
    return [analyzer.polarity_scores(to_text(completion, "assistant"))["compound"] for completion in completions]


@lru_cache(maxsize=2)
def _embedded(side: str) -> PreferenceReward:
    return PreferenceReward.from_pretrained(side=side)


def _on_kind(name: str, prompts: Sequence, completions: Sequence, kind: Sequence[str] | None) -> list[float | None]:
    """Scores prompts of the kind `name` by the embedded output for them; None (TRL's "does not apply") for others."""
    if kind is None:
        raise ValueError(f"The reward of {name} prompts needs the dataset column `kind`.")
    scores: list[float | None] = [None] * len(prompts)
    rows, of_kind = _embedded(KINDS[name]).score_kind(name, prompts, completions, kind)
    for i, score in zip(rows, of_kind.tolist(), strict=True):
        scores[i] = score
    return scores


def harmless_on_harm_adjacent(
    prompts: Sequence, completions: Sequence, kind: Sequence[str] | None = None, **kwargs
) -> list[float | None]:
    """
    The embedded harmlessness score on prompts whose `kind` is `harm_adjacent`, None on all others.

    Together with [`helpful_on_everyday`] this is the balanced reward, with a separate weight and log for each kind.

    Raises:
        ValueError: the dataset has no column `kind`.
    """
    return _on_kind("harm_adjacent", prompts, completions, kind)


def helpful_on_everyday(
    prompts: Sequence, completions: Sequence, kind: Sequence[str] | None = None, **kwargs
) -> list[float | None]:
    """
    The embedded helpfulness score on prompts whose `kind` is `everyday`, None on all others.

    Raises:
        ValueError: the dataset has no column `kind`.
    """
    return _on_kind("everyday", prompts, completions, kind)


def repetition_penalty(prompts: Sequence, completions: Sequence, **kwargs) -> list[float]:
    """
    Minus the share of repeated word 3-grams in a response, in [-1, 0]; 0 for fewer than three words.

    A preference model does not penalise repetition, and a policy that is trained on it alone ends in loops. Use this
    function in addition, with its own weight.
    """
    rewards = []
    for completion in completions:
        words = to_text(completion, "assistant").lower().split()
        ngrams = list(zip(words, words[1:], words[2:]))
        rewards.append(len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0)
    return rewards
