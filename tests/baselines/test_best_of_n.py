"""Tests of `baselines.best_of_n`."""

import numpy as np
import pytest
import torch

from baselines.best_of_n import BestOfNPolicy, Samples, best_of
from trl_proxy.prompts import to_text

TEXTS = ["a longer prompt", "b", "some more"]


def reward(prompts, completions, **columns):
    """Some number that depends on every character."""
    return [sum(map(ord, to_text(completion, "assistant"))) % 101 / 10 for completion in completions]


@pytest.fixture
def policy(tiny_lm, tiny_tokenizer):
    def build(n, seed=0, lm=None, max_new_tokens=6):
        lm = lm or tiny_lm()
        settings = {"batch_size": 2, "max_new_tokens": max_new_tokens}
        return BestOfNPolicy(lm, tiny_tokenizer, reward, n=n, seed=seed, **settings)

    return build


def test_best_of_takes_the_best_of_the_first_n():
    samples = Samples(
        texts=[["a0", "b0"], ["a1", "b1"], ["a2", "b2"]],
        token_ids=[[[1], [2, 2]], [[3], [4]], [[5, 5], [6]]],
        rewards=[[0.5, 1.0], [0.5, 2.0], [3.0, -1.0]],
        seconds=[1.0, 2.0, 4.0],
    )
    one, two, three = (best_of(samples, n) for n in (1, 2, 3))
    assert (one.texts, one.seconds, one.lm_forwards) == (["a0", "b0"], 1.0, 3)
    assert (two.texts, two.seconds, two.lm_forwards) == (["a0", "b1"], 3.0, 5)  # the first of equal ones
    assert [one.reward_calls, two.reward_calls, three.reward_calls] == [2, 4, 6]
    assert (three.texts, three.token_ids) == (["a2", "b1"], [[5, 5], [4]])
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the 3 samples that were drawn, got {n}"):
            best_of(samples, n)


def test_complete_returns_each_prompts_best_sample(policy):
    samples = policy(4).sample(TEXTS)
    completions = policy(4).complete(TEXTS)
    best = np.max(samples.rewards, axis=0)
    assert reward(TEXTS, completions.texts) == best.tolist()
    assert (best > samples.rewards[0]).any()
    assert completions.lm_forwards == sum(len(ids) for sample in samples.token_ids for ids in sample)


def test_a_smaller_n_has_the_first_samples_of_a_larger_one(policy):
    small, large = policy(2).sample(TEXTS), policy(3).sample(TEXTS)
    assert large.texts[:2] == small.texts
    assert len({tuple(texts) for texts in large.texts}) == 3  # and every sample is another
    assert policy(2, seed=1).sample(TEXTS).texts != small.texts


def test_columns_reach_the_reward(policy):
    seen = []
    one = policy(1)
    one.reward = lambda prompts, completions, **columns: seen.append(columns) or [0.0] * len(prompts)
    one.reward.__name__ = "spy"
    one.sample(TEXTS, kind=["x", "y", "z"])
    assert seen[0]["kind"] == ["x", "y", "z"]


def test_samples_come_from_the_whole_distribution(policy, tiny_lm):
    """A nearly uniform LM says everything: there is no top-k (by default 50), and nothing of the LM's own config."""
    lm = tiny_lm()
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(0.02)  # not zero: equal logits would all survive a top-k
    lm.generation_config.update(top_p=0.1, temperature=1e-3, min_p=0.9, typical_p=0.1, epsilon_cutoff=0.1)
    samples = policy(1, lm=lm, max_new_tokens=1).sample(["a"] * 900)
    counts = np.bincount([ids[0] for ids in samples.token_ids[0]], minlength=96)
    assert (counts > 0).sum() > 90
    assert counts.max() < 30  # 9.4 expected


def test_the_prompts_are_read_once_for_all_samples(policy, tiny_lm):
    """And what follows is what `generate` samples that reads them itself, from the same random numbers."""
    lm, read = tiny_lm(), []
    one = policy(3, lm=lm)
    hook = lm.register_forward_pre_hook(lambda _, __, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    samples = one.sample(TEXTS)
    hook.remove()
    longest = [max(map(len, rows)) for rows in (TEXTS[::2], TEXTS[1:2])]  # a token a character, batches of two and one
    assert [ids.shape[1] for ids in read if ids.shape[1] > 1] == [longest[0] - 1]
    for number, (indices, inputs) in enumerate(one.decoding.batches(TEXTS, batch_size=2, device="cpu")):
        for k in range(3):
            torch.manual_seed(int(np.random.SeedSequence((0, k, number)).generate_state(1)[0]))
            expected, *_ = one.decoding.generate(lm, inputs, do_sample=True, top_k=0)
            assert [samples.token_ids[k][i] for i in indices] == expected


def test_parameters_report(policy, tiny_lm):
    lm = tiny_lm()
    assert policy(2, lm=lm).parameters_report() == {
        "trainable_parameters": 0,
        "total_parameters": sum(p.numel() for p in lm.parameters()),
    }
