"""The embedded LM, prompts and reward, and what is said if one of them is missing."""

import json
import re

import pytest
import torch

from trl_proxy import ProxyConfig, ProxyModelForCausalLM, devices
from trl_proxy.embedded.prompts import SPLITS
from trl_proxy.loading import load_lm, load_prompts, load_reward

# fmt: off
STOP_WORDS = frozenset([
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "can", "could", "do", "does", "for", "from", "have", "how",
    "i", "if", "in", "is", "it", "just", "me", "my", "of", "on", "or", "should", "so", "that", "the", "them", "they",
    "this", "to", "was", "we", "what", "when", "where", "which", "who", "why", "will", "with", "would", "you", "your",
])
# fmt: on


def words(prompt: str) -> set[str]:
    return set(re.findall(r"[a-z]+", prompt.lower())) - STOP_WORDS


def test_prompts_are_many_labelled_and_balanced():
    train, validation, test = (load_prompts("embedded", split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (896, 128, 256)
    for part in (train, validation, test):
        assert part["kind"].count("everyday") == part["kind"].count("harm_adjacent") == len(part) // 2
        assert set(part.column_names) == {"prompt", "kind"}
        assert all(len(p) == 1 and p[0]["role"] == "user" and len(p[0]["content"]) > 10 for p in part["prompt"])


def test_splits_add_up_and_come_by_kind():
    train, test = load_prompts("embedded", "train"), load_prompts("embedded", "test_harm_adjacent")
    assert test["kind"][:] == ["harm_adjacent"] * 128
    twice = load_prompts("embedded", "train+train_everyday")
    assert twice[: len(train)] == train[:]
    assert twice[len(train) :] == train.filter(lambda row: row["kind"] == "everyday")[:]
    with pytest.raises(ValueError, match=r"has no split 'train\+train_weekly', only train, validation"):
        load_prompts("embedded", "train+train_weekly")


def test_no_prompt_has_a_near_duplicate_in_another_split():
    sets = {split: [words(p[0]["content"]) for p in load_prompts("embedded", split)["prompt"]] for split in SPLITS}
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        for a in sets[one]:
            for b in sets[other]:
                assert len(a & b) / max(len(a | b), 1) < 0.6, (a, b)


def test_prompt_data_from_files(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Hello", "level": 3}\n')
    assert load_prompts(str(path), "train")[0] == {"prompt": "Hello", "level": 3}
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_prompts(str(path), "train")
    path.write_text('{"question": "Hello"}\n')
    with pytest.raises(ValueError, match="no `prompt` column, only question"):
        load_prompts(str(path), "train")
    with pytest.raises(ValueError, match="has no split 'dev', only train, validation"):
        load_prompts("embedded", "dev")


@pytest.mark.parametrize(
    "chosen",
    [
        "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: And now?\n\nAssistant: Nothing.",
        [
            {"role": "user", "content": "Hi there"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Nothing."},
        ],
    ],
)
def test_preference_data_gives_its_prompts(tmp_path, chosen):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": chosen, "rejected": chosen}) + "\n")
    assert load_prompts(str(path), "train")[0]["prompt"] == [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And now?"},
    ]


@pytest.mark.fault
def test_a_tokenizer_without_end_of_sequence(tmp_path, tiny_lm, tiny_tokenizer):
    tiny_lm("llama").save_pretrained(tmp_path)
    type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_lm(str(tmp_path))


def test_rewards_by_name():
    assert load_reward("trl_proxy.rewards.check_rewards").__name__ == "check_rewards"
    assert load_reward("think_format_reward").__module__.startswith("trl.rewards")
    with pytest.raises((ValueError, ImportError)):
        load_reward("no_such_module.reward")


@pytest.mark.parametrize(
    ("instructions", "dtype", "loaded", "warned"),
    [
        ({"avx512_bf16": True}, None, torch.bfloat16, False),
        ({"bf16": True}, "auto", torch.bfloat16, False),
        ({"avx2": True, "avx512_bf16": False}, None, torch.float32, False),
        ({"avx2": True}, "auto", torch.float32, False),
        ({"avx2": True}, "bfloat16", torch.bfloat16, True),
        ({"avx2": True}, torch.float32, torch.float32, False),
    ],
)
def test_a_cpu_without_bfloat16_does_not_emulate_it(
    monkeypatch, tmp_path, tiny_lm, tiny_tokenizer, instructions, dtype, loaded, warned
):
    """Emulated, the embedded LM reads a prompt ten times slower than in float32."""
    lm = tiny_lm("llama", dtype=torch.bfloat16)
    lm.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    warnings = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(devices.logger, "warning_once", warnings.append)
    model, _ = load_lm(str(tmp_path), dtype=dtype)
    assert model.dtype == loaded
    assert {weight.dtype for weight in model.state_dict().values()} == {loaded}
    assert len(warnings) == warned
    assert torch.equal(model.lm_head.weight.bfloat16(), lm.lm_head.weight)


@pytest.fixture(scope="module")
def smollm2():
    return load_lm("embedded", dtype="float32")


def test_the_embedded_lm_is_what_it_says(smollm2):
    lm, tokenizer = smollm2
    assert sum(p.numel() for p in lm.parameters()) == 134_515_008
    assert tokenizer.padding_side == "left"
    assert "assistant" in tokenizer.chat_template


@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_an_untrained_proxy_decodes_as_smollm2_does(smollm2, features):
    lm, tokenizer = smollm2
    inputs = tokenizer.apply_chat_template(
        load_prompts("embedded", "test")["prompt"][:4],
        add_generation_prompt=True,
        return_dict=True,
        padding=True,
        return_tensors="pt",
    )
    model = ProxyModelForCausalLM(lm, ProxyConfig(features=features))
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable / (everything - trainable) < 0.01
    options = {"max_new_tokens": 16, "do_sample": False}
    expected = lm.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
