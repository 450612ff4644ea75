"""Tests of `trl_proxy.rewards.classifier` with tiny classifiers saved to disk, as a model id would be."""

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.utils import logging
from trl import apply_chat_template

from trl_proxy.loading import load_reward
from trl_proxy.rewards import classifier as module
from trl_proxy.rewards.caller import RewardCaller
from trl_proxy.rewards.classifier import ClassifierReward
from trl_proxy.rewards.functions import sentiment_reward

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "pad_token_id": 0,
}
PROMPTS = [[{"role": "user", "content": text}] for text in ("hi", "how are you", "bye")]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("well", "go on then", "")]


@pytest.fixture(scope="module")
def saved(tiny_tokenizer, tmp_path_factory):
    """`saved(kind)` -> the folder of a model of that kind."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {
        "one": lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)),
        "two": lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=2)),
        "five": lambda: BertForSequenceClassification(BertConfig(**SHAPE, num_labels=5)),
        "lm": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "bert": lambda: BertForSequenceClassification(BertConfig(**SHAPE, num_labels=1)),
        "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SHAPE, num_labels=1)),
        "gpt2": lambda: GPT2ForSequenceClassification(
            GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, num_labels=1)
        ),
    }

    def save(kind: str) -> str:
        path = folder / kind
        if not path.exists():
            torch.manual_seed(0)
            kinds[kind]().save_pretrained(path)
            tiny_tokenizer.save_pretrained(path)
        return str(path)

    return save


def adapter(base: str, folder, tiny_tokenizer, **lora) -> str:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, **lora)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["one", "bert", "roberta", "gpt2"])
def test_scores_are_those_of_one_row_at_a_time(saved, kind, tiny_tokenizer):
    reward = load_reward(saved(kind), batch_size=2)
    model = AutoModelForSequenceClassification.from_pretrained(saved(kind), dtype=torch.float32)
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        text = apply_chat_template({"messages": prompt + completion}, tiny_tokenizer)["text"]
        ids = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        expected.append(model(ids).logits.item())
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, kind=["a"] * 3) == pytest.approx(expected, abs=1e-5)
    assert reward.__name__ == kind


def test_plain_prompts_are_joined(saved):
    reward = ClassifierReward.from_pretrained(saved("one"))
    assert reward(["ab", "abc"], ["cd", "d"])[0] == pytest.approx(reward(["abc"], ["d"])[0], abs=1e-5)


def test_no_special_tokens_are_added_to_what_the_template_has(saved, tiny_tokenizer):
    tokenizer = type(tiny_tokenizer).from_pretrained(saved("one"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    assert tokenizer("a")["input_ids"][0] == 1
    reward = ClassifierReward.from_pretrained(saved("one"), tokenizer=tokenizer)
    assert reward(PROMPTS, COMPLETIONS) == ClassifierReward.from_pretrained(saved("one"))(PROMPTS, COMPLETIONS)


def test_a_function_stays_what_it_is():
    assert load_reward("trl_proxy.rewards.sentiment_reward") is sentiment_reward


def test_a_lora_adapter_with_its_head_is_a_reward_model(saved, tmp_path, tiny_tokenizer):
    """Two loads give the same scores: the head comes from the adapter."""
    folder = adapter(saved("lm"), tmp_path / "adapter", tiny_tokenizer, task_type="SEQ_CLS")
    first, second = (load_reward(folder)(PROMPTS, COMPLETIONS) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kind", ["one", "bert", "roberta", "gpt2"])
def test_too_long_texts_lose_their_beginning(saved, kind, tiny_tokenizer, monkeypatch):
    """One warning, the same score as of what is left, and a response still counts after a long prompt."""
    warned = []
    monkeypatch.setattr(module.logger, "warning_once", warned.append)
    reward = load_reward(saved(kind))
    limit = 63 if kind == "roberta" else 64  # RoBERTa's first position is that of padding
    assert reward.max_length == limit
    end = "the end of the answer"
    scores = reward(["p" * 100, "q" * 300, "p" * 100], [end, end, end[::-1]])
    assert scores[0] == pytest.approx(reward(["p" * (limit - len(end))], [end])[0], abs=1e-5)
    assert abs(scores[0] - scores[2]) > 1e-4
    assert warned == [f"Texts longer than the {limit} tokens of the reward model {kind} lose their beginning."]


def test_the_tokenizers_limit_counts_too(saved, tiny_tokenizer):
    tokenizer = type(tiny_tokenizer).from_pretrained(saved("one"), model_max_length=8)
    reward = ClassifierReward.from_pretrained(saved("one"), tokenizer=tokenizer)
    assert reward(["abcdefgh"], ["ij"]) == pytest.approx(reward(["cdefgh"], ["ij"]), abs=1e-6)


def test_a_tokenizer_without_padding_uses_its_end_of_sequence(saved, tiny_tokenizer):
    tokenizer = type(tiny_tokenizer).from_pretrained(saved("one"))
    tokenizer.pad_token = None
    reward = ClassifierReward.from_pretrained(saved("one"), tokenizer=tokenizer)
    assert reward.model.config.pad_token_id == tokenizer.eos_token_id
    alone = [reward([p], [c])[0] for p, c in (("a", "bcd"), ("ef", "g"))]
    assert reward(["a", "ef"], ["bcd", "g"]) == pytest.approx(alone, abs=1e-5)


def test_a_module_in_training_mode_is_put_into_evaluation_mode(saved):
    model = AutoModelForSequenceClassification.from_pretrained(saved("bert")).train()
    reward = RewardCaller(model).functions[0]
    assert reward(["a"], ["b"]) == reward(["a"], ["b"])
    assert reward.__name__ == "bert"


def test_the_chat_templates_arguments_reach_it(saved, tiny_tokenizer):
    tokenizer = type(tiny_tokenizer).from_pretrained(saved("one"))
    tokenizer.chat_template = "{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    caller = RewardCaller(
        ClassifierReward.from_pretrained(saved("one"), tokenizer=tokenizer), chat_template_kwargs={"mood": "sad"}
    )
    assert caller.functions[0].texts(PROMPTS[:1], COMPLETIONS[:1]) == ["sadhiwell"]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("two", r"The reward model .*two has 2 labels, and a reward is one number: take a model with one label"),
        ("five", r"The reward model .*five has 5 labels, and a reward is one number: take a model with one label"),
        ("lm", r"The model .*lm is no reward model: it has no weights score.weight, and random ones"),
    ],
)
def test_what_is_no_reward_model_is_refused(saved, kind, message):
    with pytest.raises(ValueError, match=message) as error:
        load_reward(saved(kind))
    assert "\n" not in str(error.value)


@pytest.mark.fault
def test_a_module_with_several_labels_is_refused(saved):
    model = AutoModelForSequenceClassification.from_pretrained(saved("two"))
    with pytest.raises(ValueError, match="has 2 labels, and a reward is one number"):
        RewardCaller(model)
    with pytest.raises(ValueError, match="must be a sequence classifier of transformers, got Linear"):
        RewardCaller(torch.nn.Linear(2, 1))


@pytest.mark.fault
def test_an_adapter_without_a_head_is_refused(saved, tmp_path, tiny_tokenizer):
    folder = adapter(saved("lm"), tmp_path / "headless", tiny_tokenizer)
    with pytest.raises(ValueError, match=r"is no reward model: it has no weights score\.weight"):
        load_reward(folder)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no-org/no-model",
            r"^The reward model no-org/no-model cannot be loaded \(.+\): give the folder or the hub id",
        ),
        ("no-model", r"^The reward model no-model cannot be loaded \(.+\): give the folder or the hub id"),
        ("./no-folder", r"^The reward model ./no-folder is neither a folder nor a model id of the hub"),
        ("empty", r"^The folder empty holds no reward model: it has no config.json"),
        ("no/such/folder", r"^The reward model no/such/folder is neither a folder nor a model id of the hub"),
    ],
)
def test_a_name_that_is_no_model_is_refused_in_one_sentence(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    with pytest.raises(ValueError, match=message) as error:
        load_reward(name)
    assert "\n" not in str(error.value)


@pytest.mark.fault
def test_a_folder_without_a_tokenizer_is_refused(saved, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(saved("one")).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"The tokenizer of the reward model .*bare cannot be loaded \(") as error:
        load_reward(str(tmp_path / "bare"))
    assert "\n" not in str(error.value)


@pytest.mark.fault
def test_conversations_need_the_reward_models_chat_template(saved, tiny_tokenizer):
    tokenizer = type(tiny_tokenizer).from_pretrained(saved("one"))
    tokenizer.chat_template = None
    caller = RewardCaller(ClassifierReward.from_pretrained(saved("one"), tokenizer=tokenizer))
    caller.check(["prompt"], "plain text needs none")
    with pytest.raises(ValueError, match="has no chat template"):
        caller.check(["prompt"], PROMPTS[0])


@pytest.mark.fault
def test_an_empty_text_is_named(saved):
    with pytest.raises(ValueError, match="The reward model one has nothing to read for the prompt ''"):
        load_reward(saved("one"))(["a", ""], ["b", ""])


def test_what_is_refused_leaves_the_logging_as_it_was(saved):
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    with pytest.raises(ValueError, match="2 labels"):
        load_reward(saved("two"))
    found = logging.get_verbosity()
    logging.set_verbosity(before)
    assert found == logging.INFO
