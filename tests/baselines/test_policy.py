"""Tests of `baselines.policy` and `baselines.sft`: one decoding path, the same batches, the same tokens."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from baselines.policy import decode_texts, generate_batches, in_order
from baselines.proxy import ProxyPolicy
from baselines.sft import GreedyPolicy
from trl_proxy import ProxyConfig, ProxyModelForCausalLM
from trl_proxy.decoding.settings import DecodingSettings, encode_prompts

TEXTS = ["a longer prompt of many letters", "b", "some more", "one", "the last of the five"]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS]


def greedy_alone(lm, tokenizer, ids, max_new_tokens) -> list[int]:
    """One prompt, no padding, transformers' own generate."""
    output = lm.generate(torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, len(ids) :].tolist()


def test_prompts_are_encoded_as_trl_encodes_them(tiny_tokenizer):
    encoded = encode_prompts(CONVERSATIONS, tiny_tokenizer)
    template = "u:b<eos>a:"
    assert encoded[1] == tiny_tokenizer(template)["input_ids"]
    assert encode_prompts(TEXTS, tiny_tokenizer)[1] == tiny_tokenizer("b")["input_ids"]


@pytest.mark.fault
def test_conversations_need_a_chat_template(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"has no chat template: set `chat_template` in its files"):
        encode_prompts(CONVERSATIONS, tiny_tokenizer)
    assert len(encode_prompts(TEXTS, tiny_tokenizer)) == 5


@pytest.mark.parametrize("prompts", [TEXTS, CONVERSATIONS], ids=["plain", "conversational"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_sft_equals_generate_on_each_prompt_alone(tiny_lm, tiny_tokenizer, prompts, batch_size):
    lm = tiny_lm()
    completions = GreedyPolicy(lm, tiny_tokenizer, batch_size=batch_size, max_new_tokens=12).complete(prompts)
    expected = [greedy_alone(lm, tiny_tokenizer, ids, 12) for ids in encode_prompts(prompts, tiny_tokenizer)]
    assert completions.token_ids == expected
    assert completions.texts == tiny_tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert completions.lm_forwards == sum(map(len, expected))
    assert completions.seconds > 0
    assert completions.stats == {}


def test_responses_end_with_eos_and_without_padding(tiny_lm, tiny_tokenizer):
    lm = tiny_lm()
    first = GreedyPolicy(lm, tiny_tokenizer, batch_size=8, max_new_tokens=12).complete(TEXTS)
    lm.generation_config.eos_token_id = first.token_ids[0][3]  # now one answer ends before the others
    stop = first.token_ids[0][3]
    completions = GreedyPolicy(lm, tiny_tokenizer, batch_size=8, max_new_tokens=12).complete(TEXTS)
    cut = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in first.token_ids]
    assert completions.token_ids == cut
    assert len({len(ids) for ids in completions.token_ids}) > 1


def test_batches_are_sorted_and_padded_on_the_left(tiny_lm, tiny_tokenizer):
    lm, seen = tiny_lm(), []
    decoding = DecodingSettings.of(lm, tiny_tokenizer, max_new_tokens=1)
    lm.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    batches = list(generate_batches(lm, decoding, TEXTS, batch_size=2, desc="", do_sample=False))
    assert [indices for indices, _, _ in batches] == [[0, 4], [2, 3], [1]]  # longest first
    assert seen[1].tolist() == [
        tiny_tokenizer("some more")["input_ids"],
        [tiny_tokenizer.pad_token_id] * 6 + tiny_tokenizer("one")["input_ids"],
    ]


def test_in_order():
    assert in_order([([2, 0], [[20], [0]]), ([1], [[10]])]) == [[0], [10], [20]]


@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_an_untrained_proxy_answers_as_sft(tiny_lm, tiny_tokenizer, features):
    lm = tiny_lm()
    model = ProxyModelForCausalLM(lm, ProxyConfig(features=features))
    plain = GreedyPolicy(lm, tiny_tokenizer, batch_size=2, max_new_tokens=12).complete(CONVERSATIONS)
    gated = ProxyPolicy(model, tiny_tokenizer, batch_size=2, max_new_tokens=12).complete(CONVERSATIONS)
    assert (gated.token_ids, gated.texts) == (plain.token_ids, plain.texts)
    # With candidate features the last token is fed too: the gate judges it before it is accepted
    assert gated.lm_forwards == plain.lm_forwards + (len(TEXTS) if features == "candidate" else 0)
    assert gated.stats["accepted_rank_mean"] == 0.0
    with model.disable_proxy():
        disabled = GreedyPolicy(model, tiny_tokenizer, batch_size=2, max_new_tokens=12).complete(CONVERSATIONS)
    assert disabled.token_ids == plain.token_ids


@pytest.mark.parametrize("features", ["prefix", "candidate"])
def test_proxy_statistics_equal_the_brute_force(tiny_lm, tiny_tokenizer, with_random_gate, brute_force, features):
    config = ProxyConfig(features=features, p_t=0.02, max_candidates=4)
    model = with_random_gate(tiny_lm(), config)
    completions = ProxyPolicy(model, tiny_tokenizer, batch_size=2, max_new_tokens=8).complete(TEXTS)
    rows = [
        brute_force.decode(model, torch.tensor([ids]), torch.ones(1, len(ids)), 8, tree=False)[0]
        for ids in encode_prompts(TEXTS, tiny_tokenizer)
    ]
    assert completions.token_ids == [row.tokens for row in rows]
    rejected = sum(not decision.accept for row in rows for decision in row.decisions)
    decided = sum(len(row.decisions) for row in rows)
    assert 0 < rejected < decided
    assert completions.stats["reject_rate"] == pytest.approx(rejected / decided)
    tokens = sum(len(row.tokens) for row in rows)
    assert completions.stats["accepted_rank_mean"] == pytest.approx(rejected / tokens)
    assert completions.lm_forwards == sum(row.lm_forwards for row in rows)


def test_the_trace_has_characters_of_several_tokens(tiny_lm, with_random_gate):
    """Each of the 96 tokens is a byte: letters, a space, and bytes of which characters such as `é` have two."""
    others = sorted(name for name in pre_tokenizers.ByteLevel.alphabet() if name > "~" and name != "Ġ")
    names = ["<pad>", "<bos>", "<eos>", *"Ġabcdefghijklmnopqrstuvwxyz", *others]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names[:96])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    model = with_random_gate(tiny_lm(), ProxyConfig(p_t=0.02, max_candidates=4))
    completions = ProxyPolicy(model, tokenizer, batch_size=2, max_new_tokens=60).complete(TEXTS)
    texts = ["".join(text for text, _ in response) for response in completions.trace]
    assert texts == [tokenizer.decode(ids) for ids in completions.token_ids]
    rejected = "".join(text for response in completions.trace for _, candidates in response for text in candidates)
    for shown in ("".join(texts), rejected):
        assert any(character > "~" and character != "\ufffd" for character in shown)
    assert "\ufffd" not in rejected
    assert "<0x" in rejected


def test_a_proxy_without_decisions_has_no_reject_rate(tiny_lm, tiny_tokenizer):
    model = ProxyModelForCausalLM(tiny_lm(), ProxyConfig(max_candidates=1))
    stats = ProxyPolicy(model, tiny_tokenizer, batch_size=2, max_new_tokens=3).complete(TEXTS).stats
    assert stats == {"reject_rate": None, "accepted_rank_mean": 0.0}


def test_sampled_decisions_follow_the_seed(tiny_lm, tiny_tokenizer, with_random_gate):
    model = with_random_gate(tiny_lm(), ProxyConfig(p_t=0.02), scale=0.5)
    complete = lambda seed: (  # noqa: E731
        ProxyPolicy(model, tiny_tokenizer, batch_size=2, max_new_tokens=8, gate_sample=True, seed=seed)
        .complete(TEXTS)
        .token_ids
    )
    assert complete(0) == complete(0)
    assert complete(0) != complete(1)


def test_decode_texts_leaves_special_tokens_out(tiny_tokenizer):
    assert decode_texts(tiny_tokenizer, [[*tiny_tokenizer("hi")["input_ids"], 2], [2]]) == ["hi", ""]
