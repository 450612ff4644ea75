"""Tests of `eval.comparison`: groups, gains and win rates over seeds."""

import numpy as np
import pytest

from eval.comparison import Comparison
from eval.stats import mean_ci, seeds_mean_ci, seeds_rate_ci


def test_groups_put_sft_first_and_n_in_its_order(records):
    groups = Comparison(records).groups
    assert list(groups) == ["sft", "best_of_n (n=2)", "best_of_n (n=16)", "proxy (prefix)"]
    assert [record["seed"] for record in groups["proxy (prefix)"]] == [0, 1]


@pytest.mark.fault
@pytest.mark.parametrize(("key", "value"), [("prompts_sha256", "1" * 64), ("model", "x"), ("max_new_tokens", 9)])
def test_records_that_cannot_be_compared_are_refused(records, make_record, key, value):
    other = make_record("proxy", [0.0] * 4, **{key: value})
    with pytest.raises(ValueError, match=f"the records differ in {key} .*{value}"):
        Comparison([*records, other])


def test_gain_over_seeds(records):
    comparison, proxies = Comparison(records), [r for r in records if r["method"] == "proxy"]
    sft = comparison.sft
    mean, interval = comparison.gain(proxies)
    assert mean == np.mean([[1, 1, 0, -1], [2, 2, 2, 1]])
    assert interval == seeds_mean_ci([[1, 1, 0, -1], [2, 2, 2, 1]])
    assert comparison.gain(proxies, "everyday") == (1.5, seeds_mean_ci([[1, 1], [2, 2]]))
    assert comparison.gain(proxies[:1]) == (0.25, mean_ci([1, 1, 0, -1]))
    assert comparison.gain([sft]) is None
    assert Comparison(proxies).gain(proxies) is None
    assert comparison.gain(proxies, gold=True) is None


def test_gold_gain_over_seeds(make_record):
    sft = make_record("sft", [1.0, 2.0, 1.0, 2.0], gold_rewards=[0.0, 0.0, 0.0, 0.0])
    seeds = [make_record("proxy", [1.0] * 4, sft, seed=k, gold_rewards=[k, k, 2 * k, 2 * k]) for k in (1, 2)]
    assert Comparison([sft, *seeds]).gain(seeds, gold=True) == (2.25, seeds_mean_ci([[1, 1, 2, 2], [2, 2, 4, 4]]))
    one = {**seeds[0], "gold_delta_vs_sft": 1.5, "gold_delta_ci95": [1.0, 2.0]}
    assert Comparison([sft, one]).gain([one], gold=True) == (1.5, [1.0, 2.0])


def test_win_rate_over_seeds(records):
    """The win rate of one record is its own; of several, every seed and prompt counts."""
    comparison = Comparison(records)
    (two,), proxies = comparison.groups["best_of_n (n=2)"], comparison.groups["proxy (prefix)"]
    assert comparison.win_rate([two]) == (two["win_rate_vs_sft"], two["win_rate_ci95"])
    rate, interval = comparison.win_rate(proxies)
    assert rate == np.mean([[1, 1, 0.5, 0], [1, 1, 1, 1]])
    assert interval == seeds_rate_ci([[1, 1, 0.5, 0], [1, 1, 1, 1]])
    assert comparison.win_rate([comparison.sft]) is None


def test_what_is_not_sft_is_measured_against_it(records):
    comparison = Comparison(records)
    assert list(comparison.others) == list(comparison.groups)[1:]
    assert comparison.only(lambda record: record["method"] == "proxy").sft is None
    assert comparison.kinds == ["everyday", "harm_adjacent"]


@pytest.mark.fault
def test_no_records_are_refused():
    with pytest.raises(ValueError, match="no records to compare"):
        Comparison([])
