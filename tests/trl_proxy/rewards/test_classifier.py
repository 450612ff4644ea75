"""Tests of `baselines.reward_model` with a tiny classifier saved to disk, as a model id would be."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from trl import apply_chat_template

from trl_proxy.loading import load_callable_reward
from trl_proxy.rewards.classifier import ClassifierReward
from trl_proxy.rewards.functions import sentiment_reward


@pytest.fixture(scope="module")
def classifier(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.25,
        num_labels=1,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


PROMPTS = [[{"role": "user", "content": text}] for text in ("hi", "how are you", "bye")]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("well", "go on then", "")]


@torch.no_grad()
def test_scores_are_those_of_one_row_at_a_time(classifier, tiny_tokenizer):
    reward = load_callable_reward(classifier, batch_size=2, device="cpu")
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        text = apply_chat_template({"messages": prompt + completion}, tiny_tokenizer)["text"]
        ids = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        expected.append(model(ids).logits.item())
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, kind=["a"] * 3) == pytest.approx(expected, abs=1e-5)
    assert reward.__name__ == classifier


def test_plain_prompts_are_joined(classifier):
    reward = ClassifierReward(classifier, batch_size=8, device="cpu")
    assert reward(["ab", "abc"], ["cd", "d"])[0] == pytest.approx(reward(["abc"], ["d"])[0], abs=1e-5)


def test_functions_and_none_stay_what_they_are():
    assert load_callable_reward("trl_proxy.rewards.sentiment_reward", batch_size=1, device="cpu") is sentiment_reward
    assert load_callable_reward(None, batch_size=1, device="cpu") is None
