"""Tests of the modules under `eval/metrics`: they load without a network, and say what `eval.stats` says."""

import copy
import doctest
import inspect
import math
import socket
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from eval.length_control import length_controlled_win_rate
from eval.stats import distinct_n, mean_ci, sampled_kl, win_rate, win_scores

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.parent.name for path in (ROOT / "eval" / "metrics").glob("*/*.py"))
SCORES, OTHERS = [1.0, 2.0, 3.0, 4.0, 0.5], [0.0, 2.0, 5.0, 3.0, 0.0]


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(str(ROOT / "eval" / "metrics" / name), cache_dir=str(tmp_path))


def test_all_are_tested():
    assert NAMES == [
        "distinct_n",
        "kl_to_lm",
        "length_controlled_win_rate",
        "perplexity_under_lm",
        "reward_distribution",
        "win_rate",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_the_description_are_true(load, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    metric = load(name)
    assert metric.name == name
    assert len(metric.description) > 80
    assert metric.citation.strip().startswith("@")
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {"evaluate": evaluate}, name, None, 0)
    failed, attempted = doctest.DocTestRunner().run(example)
    assert attempted >= 2
    assert failed == 0


def test_they_load_from_any_folder_without_a_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"looked for the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        metric = evaluate.load(str(ROOT / "eval" / "metrics" / name), cache_dir=str(tmp_path / "data"))
        assert not Path(inspect.getfile(type(metric))).is_relative_to(ROOT)  # a copy, which finds `eval` by its name
        if name == "win_rate":
            assert metric.compute(predictions=[1, 2, 3], references=[0, 2, 5])["win_rate"] == 0.5


def test_win_rate(load):
    expected = win_rate(SCORES, OTHERS)
    assert load("win_rate").compute(predictions=SCORES, references=np.array(OTHERS)) == {
        "win_rate": 0.7,
        "ci95": expected.ci95,
        "tie_rate": 0.2,
        "p_value": 0.625,  # 3 of 4 that differ
    }


def test_win_rate_adds_up_batches(load):
    metric = load("win_rate")
    metric.add_batch(predictions=SCORES[:2], references=OTHERS[:2])
    metric.add_batch(predictions=SCORES[2:], references=OTHERS[2:])
    assert metric.compute()["ci95"] == win_rate(SCORES, OTHERS).ci95


def test_length_controlled_win_rate(load):
    lengths = {"prediction_lengths": [9, 8, 3, 5, 7], "reference_lengths": [4, 5, 6, 7, 8]}
    result = load("length_controlled_win_rate").compute(predictions=SCORES, references=OTHERS, **lengths)
    expected = length_controlled_win_rate(win_scores(SCORES, OTHERS), *lengths.values())
    assert list(result.values()) == [expected.rate, expected.ci95, expected.length_effect, 0.7]
    lengths = {"prediction_lengths": [2], "reference_lengths": [1]}
    few = load("length_controlled_win_rate").compute(predictions=[1], references=[0], **lengths)
    assert list(few.values()) == [None, None, None, 1.0]


def test_reward_distribution(load):
    metric, rewards = load("reward_distribution"), np.random.default_rng(0).exponential(size=40)
    result = metric.compute(predictions=rewards)
    assert (result["n"], result["min"], result["max"]) == (40, min(rewards), max(rewards))
    assert result["mean"] == pytest.approx(sum(rewards) / 40)
    assert result["ci95"] == mean_ci(rewards)
    assert result["std"] ** 2 == pytest.approx(sum((rewards - rewards.mean()) ** 2) / 39)
    assert list(result["quantiles"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    middle = sorted(rewards)[19:21]
    assert result["quantiles"]["0.5"] == pytest.approx(sum(middle) / 2)
    one = metric.compute(predictions=[2.0])
    assert (one["mean"], one["ci95"], one["std"], one["quantiles"]["0.95"]) == (2.0, None, None, 2.0)


def test_kl_to_lm(load):
    policy, lm = [[-0.1, -0.2, -0.3], [-0.5], []], [[-1.1, -0.4, -0.3], [-1.0], []]
    expected = sampled_kl(policy, lm)
    result = load("kl_to_lm").compute(predictions=policy, references=lm)
    assert (result["kl_to_lm"], result["kl_per_response"]) == pytest.approx((1.7 / 4, 1.7 / 2))
    assert (result["ci95"], result["kl_per_response_ci95"]) == (expected.per_token_ci95, expected.per_response_ci95)


def test_distinct_n(load):
    texts = ["A cat sat", "a cat ran", ""]
    assert (
        load("distinct_n").compute(predictions=texts) == {"distinct_n": distinct_n(texts, 2)} == {"distinct_n": 0.75}
    )
    assert load("distinct_n").compute(predictions=texts, n=4) == {"distinct_n": None}


@pytest.fixture(scope="module")
def saved_lm(tmp_path_factory, tiny_lm, tiny_tokenizer) -> str:
    folder = str(tmp_path_factory.mktemp("lm"))
    tiny_lm().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def brute_force_nlls(lm, prompt: list[int], response: list[int]) -> list[float]:
    logits = [lm(torch.tensor([prompt + response[:i]])).logits[0, -1].double() for i in range(len(response))]
    return [-float(row.log_softmax(-1)[token]) for row, token in zip(logits, response, strict=True)]


def test_perplexity_gives_the_bos_where_the_tokenizer_writes_one(load, tmp_path, tiny_lm, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    lm = tiny_lm()
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    question, answer = tiny_tokenizer(["Is it?", "yes"])["input_ids"]
    for prompts, given in ((None, []), (["Is it?"], question)):  # before the prompt, never between it and the text
        nlls = brute_force_nlls(lm, [tokenizer.bos_token_id, *given], answer)
        result = load("perplexity_under_lm").compute(predictions=["yes"], model=str(tmp_path / "lm"), prompts=prompts)
        assert result["lm_logprob_per_token"] == pytest.approx(-sum(nlls) / 3, abs=1e-4)
        assert result["ci95"] is None


@pytest.mark.parametrize("prompts", ["strings", "conversations", None])
def test_perplexity_is_that_of_one_token_at_a_time(load, saved_lm, tiny_lm, tiny_tokenizer, prompts):
    texts, questions, lm = ["yes, it is", "", "no"], ["Is it?", "Well?", "Was it not?"], tiny_lm()
    ids = tiny_tokenizer(texts)["input_ids"]
    if prompts == "strings":
        prompts = questions
        pairs = zip(tiny_tokenizer(questions)["input_ids"], ids, strict=True)
    elif prompts == "conversations":
        prompts = [[{"role": "user", "content": question}] for question in questions]
        # the template of the tests' tokenizer
        pairs = zip(tiny_tokenizer([f"u:{question}<eos>a:" for question in questions])["input_ids"], ids, strict=True)
    else:
        pairs = ((row[:1], row[1:]) for row in ids)
    nlls = [brute_force_nlls(lm, *pair) for pair in pairs]
    result = load("perplexity_under_lm").compute(predictions=texts, model=saved_lm, prompts=prompts, batch_size=2)
    mean = sum(map(sum, nlls)) / sum(map(len, nlls))
    assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert result["lm_logprob_per_token"] == pytest.approx(-mean, abs=1e-4)
    expected = [math.exp(sum(row) / len(row)) if row else None for row in nlls]
    assert result["perplexities"] == [None if e is None else pytest.approx(e, rel=1e-4) for e in expected]
    assert result["ci95"][0] <= result["perplexity"] <= result["ci95"][1]
    assert expected[1] is None


PAIRED = "Mismatch in the number of predictions (2) and references (1)"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("win_rate", {"predictions": [], "references": []}, "win_rate got no pairs of scores"),
        ("win_rate", {"predictions": [1, 2], "references": [1]}, PAIRED),
        (
            "win_rate",
            {"predictions": [1, float("nan")], "references": [1, 2]},
            "values must be finite numbers, got nan",
        ),
        ("reward_distribution", {"predictions": []}, "reward_distribution got no rewards"),
        ("reward_distribution", {"predictions": [1], "quantiles": [50]}, "quantiles must lie between 0 and 1, got 50"),
        ("reward_distribution", {"predictions": [1, float("inf")]}, "values must be finite numbers, got inf"),
        (
            "length_controlled_win_rate",
            {"predictions": [], "references": [], "prediction_lengths": [], "reference_lengths": []},
            "length_controlled_win_rate got no pairs of scores",
        ),
        (
            "length_controlled_win_rate",
            {"predictions": [1, 2], "references": [1, 2], "prediction_lengths": [1], "reference_lengths": [1, 2]},
            "Mismatch in the number of predictions (2) and prediction_lengths (1)",
        ),
        ("kl_to_lm", {"predictions": [], "references": []}, "kl_to_lm got no responses"),
        ("kl_to_lm", {"predictions": [[-1], [-1]], "references": [[-1]]}, PAIRED),
        ("kl_to_lm", {"predictions": [[-1, -1]], "references": [[-1]]}, "2 tokens in response 0, lm_logprobs 1"),
        ("distinct_n", {"predictions": []}, "distinct_n got no texts"),
        ("distinct_n", {"predictions": ["a"], "n": 0}, "n must be at least 1, got 0"),
        ("perplexity_under_lm", {"predictions": [], "model": "none"}, "perplexity_under_lm got no texts"),
        (
            "perplexity_under_lm",
            {"predictions": ["a", "b"], "prompts": ["a"], "model": "none"},
            "prompts has 1 entries for 2 predictions",
        ),
    ],
)
def test_bad_arguments_give_one_sentence(load, name, arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load(name).compute(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.fault
def test_perplexity_needs_something_to_predict(load, saved_lm):
    metric = load("perplexity_under_lm")
    with pytest.raises(ValueError, match="no text with a token to predict"):
        metric.compute(predictions=["a", ""], model=saved_lm)
    with pytest.raises(ValueError, match=r"prompts\[1\] has no tokens"):
        metric.compute(predictions=["", "b"], prompts=["", ""], model=saved_lm)
