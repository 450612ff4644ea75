"""Tests of `eval.harness`: the record, key by key, from responses whose rewards are known."""

import json
import re

import numpy as np
import pytest
from datasets import Dataset

from baselines.policy import Completions
from baselines.sft import GreedyPolicy
from eval.harness import evaluate_completions, evaluate_policy
from eval.likelihood import likelihood
from eval.records import Record, Run, git_commit, prompts_sha256, read_records
from eval.stats import mean_ci, rate_ci
from trl_proxy.decoding.settings import DecodingSettings, encode_prompts
from trl_proxy.prompts import to_text

# The contract: what every reader of records may count on, in the words of the design
CONTRACT = [
    *("method", "variant", "seed", "model", "reward_model", "dataset", "n_prompts", "max_new_tokens"),
    *(
        "trainable_parameters",
        "total_parameters",
        "adapter_bytes",
        "episodes",
        "train_seconds",
        "train_peak_memory_mb",
    ),
    *("reward_mean", "reward_ci95", "delta_vs_sft", "delta_ci95", "gold_reward_mean", "gold_reward_ci95"),
    *("gold_delta_vs_sft", "win_rate_vs_sft", "win_rate_ci95", "tie_rate", "judge", "by_kind", "lm_logprob_per_token"),
    *("kl_to_lm", "response_tokens_mean", "distinct_2", "lm_forwards_per_token", "tokens_per_second"),
    *("tokens_per_second_sft", "reject_rate", "accepted_rank_mean", "rewards", "responses", "prompts_sha256"),
    *("versions", "git_commit", "command", "started_at", "decoding"),
]
KIND_CONTRACT = ["n_prompts", "reward_mean", "delta_vs_sft", "delta_ci95", "gold_delta_vs_sft", "refusal_rate"]

PROMPTS = Dataset.from_list(
    [
        {"prompt": [{"role": "user", "content": text}], "kind": kind}
        for text, kind in [("a", "everyday"), ("bb", "harm_adjacent"), ("ccc", "everyday"), ("dddd", "harm_adjacent")]
    ]
)


def length(prompts, completions, **columns):
    """Characters of the response; it also sees the dataset's columns."""
    assert columns["kind"] == PROMPTS["kind"][:]
    return [float(len(to_text(completion, "assistant"))) for completion in completions]


def vowels(prompts, completions, **columns):
    return [sum(c in "aeiou" for c in to_text(completion, "assistant")) / 10 for completion in completions]


class Fixed:
    """A policy that answers what it is told to, two seconds after."""

    def __init__(self, tokenizer, texts, **stats):
        self.tokenizer, self.texts, self.stats = tokenizer, texts, stats

    def complete(self, prompts):
        ids = [self.tokenizer(text)["input_ids"] for text in self.texts]
        return Completions(self.texts, ids, seconds=2.0, lm_forwards=3 * sum(map(len, ids)), stats=self.stats)


def run(method, **kwargs):
    return Run(method=method, seed=3, model="tiny", reward_model="length", dataset="four", max_new_tokens=8, **kwargs)


@pytest.fixture
def evaluate(tiny_lm, tiny_tokenizer, tmp_path):
    lm = tiny_lm()

    def evaluate(texts, method="sft", baseline=None, gold=vowels, kwargs=None, **stats):
        return evaluate_policy(
            Fixed(tiny_tokenizer, texts, **stats),
            PROMPTS,
            length,
            gold,
            lm,
            DecodingSettings.of(lm, tiny_tokenizer, max_new_tokens=8),
            run=run(method, variant=None if method == "sft" else "n=2"),
            output_dir=tmp_path,
            baseline_record=baseline,
            **(kwargs or {}),
        )

    return evaluate


SFT = ["ab", "abcd", "abc", "I cannot."]
OTHER = ["ab", "abcdef", "I can't do it", "abcdefg"]


def test_the_record_has_every_key_of_the_contract(evaluate):
    record = evaluate(SFT)
    assert set(CONTRACT) <= record.keys()
    assert all(set(KIND_CONTRACT) <= kind.keys() for kind in record["by_kind"].values())
    assert list(record) == list(Record.__dataclass_fields__)


@pytest.mark.fault
def test_a_forgotten_key_fails_at_once(evaluate):
    record = evaluate(SFT)
    del record["tie_rate"]
    with pytest.raises(TypeError, match="tie_rate"):
        Record(**record)


def test_sft_record(evaluate):
    record = evaluate(SFT)
    assert record["rewards"] == [2, 4, 3, 9]
    assert record["reward_mean"] == 4.5
    assert record["reward_ci95"] == mean_ci([2, 4, 3, 9])
    assert record["gold_rewards"] == [0.1, 0.1, 0.1, 0.2]
    not_applicable = ("delta_vs_sft", "delta_ci95", "gold_delta_vs_sft", "win_rate_vs_sft", "win_rate_ci95", "judge")
    assert all(record[key] is None for key in not_applicable)
    assert record["tokens_per_second"] == record["tokens_per_second_sft"] == 18 / 2  # a token per character
    assert record["lm_forwards_per_token"] == 3.0
    assert (record["lm_tokens_per_response"], record["reward_calls_per_response"]) == (3 * 18 / 4, 0)
    assert record["response_tokens_mean"] == 18 / 4
    assert {kind: values["refusal_rate"] for kind, values in record["by_kind"].items()} == {
        "everyday": 0.0,
        "harm_adjacent": 0.5,
    }
    assert record["prompts"] == ["a", "bb", "ccc", "dddd"]
    assert record["prompts_sha256"] == prompts_sha256(PROMPTS["prompt"][:])
    assert record["versions"].keys() >= {"python", "torch", "transformers", "trl"}
    assert record["started_at"].endswith("Z")


def test_another_method_is_paired_with_sft(evaluate):
    sft = evaluate(SFT)
    record = evaluate(OTHER, "best_of_n", sft, kwargs={"tokens_per_second_sft": 20.0}, reject_rate=0.25)
    deltas = [0, 2, 10, -2]  # rewards 2, 6, 13, 7
    assert record["delta_vs_sft"] == np.mean(deltas)
    assert record["delta_ci95"] == mean_ci(deltas)
    assert (record["win_rate_vs_sft"], record["tie_rate"]) == (0.625, 0.25)
    assert record["win_rate_ci95"] == rate_ci(2.5, 4)
    assert record["judge"] == "reward length"
    assert record["gold_delta_vs_sft"] == pytest.approx(np.mean([0.0, 0.1, 0.2, 0.0]))
    everyday = record["by_kind"]["everyday"]
    assert (everyday["n_prompts"], everyday["reward_mean"], everyday["delta_vs_sft"]) == (2, 7.5, 5.0)
    assert everyday["delta_ci95"] == mean_ci([0, 10])
    assert everyday["refusal_rate"] == 0.5
    assert record["by_kind"]["harm_adjacent"]["delta_vs_sft"] == 0.0
    assert (record["tokens_per_second_sft"], record["reject_rate"], record["accepted_rank_mean"]) == (20.0, 0.25, None)


def test_rounding_does_not_part_equal_responses(evaluate):
    calls = []

    def noisy(prompts, completions, **columns):
        calls.append(None)
        return [value + 1e-6 * len(calls) for value in vowels(prompts, completions)]

    sft = evaluate(SFT, gold=noisy)
    gold = evaluate(OTHER, "best_of_n", sft, gold=noisy)["gold_rewards"]
    assert gold[0] == sft["gold_rewards"][0]  # the same text
    assert gold[1] == pytest.approx(0.2 + 2e-6, abs=1e-9)  # another one


def test_without_a_gold_reward_its_keys_are_null(evaluate):
    record = evaluate(OTHER, "best_of_n", evaluate(SFT, gold=None), gold=None)
    assert [record[key] for key in record if key.startswith("gold")] == [None] * 6
    assert record["by_kind"]["everyday"]["gold_delta_vs_sft"] is None
    # a gold reward that SFT was not judged by pairs with nothing
    assert evaluate(OTHER, "best_of_n", evaluate(SFT, gold=None))["gold_delta_vs_sft"] is None


def test_lm_logprob_is_per_token(evaluate, tiny_lm, tiny_tokenizer):
    record = evaluate(SFT, kwargs={"batch_size": 1})
    responses = [tiny_tokenizer(text)["input_ids"] for text in SFT]
    logprobs, _ = likelihood(tiny_lm(), encode_prompts(PROMPTS["prompt"][:], tiny_tokenizer), responses)
    assert record["lm_logprob_per_token"] == pytest.approx(sum(logprobs) / 18, abs=1e-5)
    assert record["kl_to_lm"] is None


def test_kl_of_the_lm_itself_is_zero(tiny_lm, tiny_tokenizer, tmp_path):
    lm = tiny_lm()
    policy = GreedyPolicy(lm, tiny_tokenizer, batch_size=2, max_new_tokens=8)
    arguments = (policy, PROMPTS, length, None, lm, policy.decoding)
    record = evaluate_policy(*arguments, run=run("sft"), output_dir=tmp_path, policy_lm=lm)
    assert (record["kl_to_lm"], record["lm_forwards_per_token"]) == (0.0, 1.0)


def test_records_are_written_whole_and_read_back(evaluate, tmp_path):
    sft, other = evaluate(SFT), evaluate(OTHER, "best_of_n")
    files = sorted(path.name for path in (tmp_path / "records").iterdir())
    assert files == ["best_of_n-n=2-seed3.json", "sft-seed3.json"]  # and no temporary file
    assert read_records(tmp_path) == json.loads(json.dumps([other, sft]))


@pytest.mark.fault
def test_a_record_without_a_key_is_refused(evaluate, tmp_path):
    record = evaluate(SFT)
    del record["judge"], record["kinds"]
    (tmp_path / "records" / "sft-seed3.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"sft-seed3.json lacks \['judge', 'kinds'\]"):
        read_records(tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"method": "sft", "rewards": [1.0, ', r"sft.json is no whole JSON file \(.*\): delete it"),
        (b"", "sft.json is no whole JSON file"),
        (b"\xff\xfe{}", "sft.json is no whole JSON file"),
        (b"[1, 2]", "sft.json is no record but a JSON list"),
        (b"{}", "sft.json lacks"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, content, message):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "sft.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rewards", "1234", "rewards must be a list of numbers, got '1234'"),
        ("rewards", None, "rewards must be a list of numbers, got None"),
        ("rewards", [0.5, None, 1.0, 2.0], "rewards.1 must be a number, got None"),
        ("by_kind", None, "by_kind must be a dict, got None"),
        ("by_kind", {"everyday": {}}, "by_kind.everyday lacks delta_ci95, delta_vs_sft, n_prompts"),
        ("settings", None, "settings must be a dict"),
        ("method", 5, "method must be text, got 5"),
        ("variant", 5, "variant must be text or null, got 5"),
        ("seed", True, "seed must be a whole number, got True"),
        ("seed", 0.5, "seed must be a whole number, got 0.5"),
        ("reward_ci95", "0.1", "reward_ci95 must be a list of numbers or null, got '0.1'"),
        ("delta_ci95", [0.1], "delta_ci95 must have 2 entries, got 1"),
        ("versions", {"torch": 2}, "versions.torch must be text, got 2"),
        ("trace", [[["a"]]] * 4, "trace.0.0 must have 2 entries, got 1"),
    ],
)
def test_a_record_with_a_value_of_another_type_is_refused(evaluate, tmp_path, key, value, message):
    path = tmp_path / "records" / "sft-seed3.json"
    path.write_text(json.dumps({**evaluate(SFT), key: value}))
    with pytest.raises(ValueError, match=rf"sft-seed3.json is damaged \({re.escape(message)}.*\): delete it and ev"):
        read_records(tmp_path)


@pytest.mark.fault
def test_a_record_with_a_response_missing_is_refused(evaluate, tmp_path):
    record = evaluate(SFT)
    path = tmp_path / "records" / "sft-seed3.json"
    path.write_text(json.dumps({**record, "responses": record["responses"][:-1]}))
    with pytest.raises(ValueError, match=r"sft-seed3.json has 3 responses for 4 prompts"):
        read_records(tmp_path)


@pytest.mark.fault
def test_no_records(tmp_path):
    with pytest.raises(ValueError, match=r"no records under .*run scripts/compare.py first"):
        read_records(tmp_path)


@pytest.mark.fault
def test_another_baseline_is_refused(evaluate):
    sft = evaluate(SFT)
    with pytest.raises(ValueError, match="baseline_record has other prompts"):
        evaluate(OTHER, "proxy", {**sft, "prompts_sha256": "f" * 64})


@pytest.mark.fault
def test_a_reward_that_is_no_number_is_refused(tiny_lm, tiny_tokenizer, tmp_path):
    def broken(prompts, completions, **columns):
        return [1.0, None, 2.0, 3.0]

    lm = tiny_lm()
    completions = Fixed(tiny_tokenizer, SFT).complete(None)
    decoding = DecodingSettings.of(lm, tiny_tokenizer, max_new_tokens=8)
    with pytest.raises(ValueError, match=r"'broken' returned None .* 'bb'"):
        evaluate_completions(completions, PROMPTS, broken, None, lm, decoding, run=run("sft"), output_dir=tmp_path)
    assert not (tmp_path / "records").exists()


def test_paths_are_safe_and_differ_by_variant(tmp_path):
    paths = [
        run("proxy", variant=variant).path(tmp_path).name for variant in (None, "prefix", "prefix, p_t=0.1", "a/b")
    ]
    assert paths == [
        "proxy-seed3.json",
        "proxy-prefix-seed3.json",
        "proxy-prefix_p_t=0.1-seed3.json",
        "proxy-a_b-seed3.json",
    ]


def test_a_strangers_method_and_seed_stay_in_the_folder(tmp_path):
    for method, seed in (("../../evil", 0), ("a/b", 0), ("proxy", "../0"), ("/etc/x", 0), ("..", 0)):
        one = run("sft")
        one.method, one.seed = method, seed
        assert one.path(tmp_path).resolve().parent == (tmp_path / "records").resolve()


def test_git_commit_outside_git_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr("eval.records.__file__", str(tmp_path / "eval" / "records.py"))
    assert git_commit() is None
