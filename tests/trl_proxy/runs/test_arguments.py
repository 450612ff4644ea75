"""Tests of `trl_proxy.runs.arguments`: the rewards that a run names."""

import pytest

from trl_proxy.rewards.functions import repetition_penalty, sentiment_reward
from trl_proxy.runs.arguments import RunArguments, load_rewards, reward_names


def test_the_reward_model_comes_before_the_functions():
    paths = ["trl_proxy.rewards.repetition_penalty", "trl_proxy.rewards.sentiment_reward"]
    assert reward_names(RunArguments()) == ["embedded"]
    assert reward_names(RunArguments(reward_model_name_or_path="org/rm", reward_funcs=paths)) == ["org/rm", *paths]
    assert reward_names(RunArguments(reward_funcs=paths[0])) == paths[:1]  # a recipe may name one without a list
    assert load_rewards(RunArguments(reward_funcs=paths), [1.0, 2.0], False) == [repetition_penalty, sentiment_reward]


@pytest.mark.fault
def test_weights_are_counted_before_a_reward_is_loaded():
    with pytest.raises(ValueError, match=r"has 1 weights for 2 rewards \(org/rm, no\.module\): give one for each"):
        load_rewards(RunArguments(reward_model_name_or_path="org/rm", reward_funcs=["no.module"]), [1.0], False)
