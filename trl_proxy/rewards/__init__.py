"""Rewards in TRL's convention: `reward(prompts, completions, **kwargs) -> list[float]`.

Prompts and completions are plain strings or conversations. `--reward_funcs trl_proxy.rewards.sentiment_reward` names
one on the command line.
"""

from ..prompts import length_buckets, to_text
from .caller import RewardCaller
from .checks import RewardError, as_list, check_rewards, import_reward
from .classifier import ClassifierReward
from .functions import harmless_on_harm_adjacent, helpful_on_everyday, repetition_penalty, sentiment_reward
from .preference import ENCODER_PACKAGE, KINDS, PreferenceReward, encoder_folder

__all__ = [
    "ENCODER_PACKAGE",
    "KINDS",
    "ClassifierReward",
    "PreferenceReward",
    "RewardCaller",
    "RewardError",
    "as_list",
    "check_rewards",
    "encoder_folder",
    "harmless_on_harm_adjacent",
    "helpful_on_everyday",
    "import_reward",
    "length_buckets",
    "repetition_penalty",
    "sentiment_reward",
    "to_text",
]
