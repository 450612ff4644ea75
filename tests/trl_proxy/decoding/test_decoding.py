"""Tests of the contract of decoding (docs: 'Exactness'): accept-everything is the LM's greedy decoding, a batch is its
rows one by one, a rejection leaves no trace, fast equals brute force, and sampled decisions follow the closed form."""

import types
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
)

from trl_proxy import ProxyConfig, ProxyModelForCausalLM
from trl_proxy.decoding import candidate_loop, prefix, prefix_cache

FEATURES = ("prefix", "candidate")
KINDS = ("llama", "gpt2", "qwen2")
# Candidate features refuse a sliding window.
MORE_KINDS = [(f, k) for f in FEATURES for k in (*KINDS, "gpt_neox")] + [("prefix", "mistral"), ("prefix", "gemma3")]
LENGTHS = (7, 3, 5, 1)
PAD, EOS = 0, 2
# More ends of sequence than one, so that rows end at different places.
MANY_EOS = [2, 11, 23, 37, 41, 59, 67, 83]
# A closer call than this may fall on either side in float32.
MARGIN = 2e-5


class EndsWith(StoppingCriteria):
    """Ends a row after one of the given tokens, which are no ends of sequence."""

    def __init__(self, token_ids):
        self.token_ids = torch.tensor(token_ids)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.token_ids)


class OnlyTheseTokens(LogitsProcessor):
    """A caller's own processor: bans everything but a few tokens, differently at every length."""

    def __call__(self, input_ids, scores):
        allowed = torch.arange(scores.shape[-1]) % 5 == input_ids.shape[1] % 5
        return scores.masked_fill(~allowed, -torch.inf)


# 1. A proxy that accepts everything reproduces `lm.generate(do_sample=False)`.


def middle_tokens(plain: torch.Tensor) -> list[int]:
    """One token from within each row of plain greedy responses `(batch, length)`."""
    return sorted({row[4 + i].item() for i, row in enumerate(plain)} - {PAD, EOS})


OPTIONS = {
    "plain": lambda plain, tokenizer: {},
    "repetition_penalty": lambda plain, tokenizer: {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": lambda plain, tokenizer: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda plain, tokenizer: {
        "bad_words_ids": [[plain[0, 1].item()], plain[1, 2:4].tolist(), plain[2, 3:5].tolist()]
    },
    "min_new_tokens": lambda plain, tokenizer: {"min_new_tokens": 9, "eos_token_id": plain[:, 3].tolist()},
    "suppress_tokens": lambda plain, tokenizer: {"suppress_tokens": middle_tokens(plain)},
    "several EOS ids": lambda plain, tokenizer: {"eos_token_id": [EOS, *middle_tokens(plain)]},
    "no EOS": lambda plain, tokenizer: {"eos_token_id": -1, "pad_token_id": PAD},
    "max_length": lambda plain, tokenizer: {"max_length": max(LENGTHS) + 9, "max_new_tokens": None},
    "stopping criterion": lambda plain, tokenizer: {"stopping_criteria": [EndsWith(middle_tokens(plain))]},
    "stop_strings": lambda plain, tokenizer: {
        "stop_strings": [tokenizer.decode(plain[0, 4:6]), tokenizer.decode(plain[1, 5:7])],
        "tokenizer": tokenizer,
    },
    "begin_suppress_tokens": lambda plain, tokenizer: {"begin_suppress_tokens": plain[:, 0].unique().tolist()},
    "sequence_bias": lambda plain, tokenizer: {"sequence_bias": [[[middle_tokens(plain)[0]], -8.0], [[40], 3.0]]},
    "forced_eos_token_id": lambda plain, tokenizer: {"forced_eos_token_id": EOS, "max_new_tokens": 6},
    "exponential_decay_length_penalty": lambda plain, tokenizer: {"exponential_decay_length_penalty": (3, 1.6)},
    "max_time": lambda plain, tokenizer: {"max_time": 0.0},  # one token
    "own processor": lambda plain, tokenizer: {"logits_processor": [OnlyTheseTokens()]},
    "together": lambda plain, tokenizer: {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "eos_token_id": MANY_EOS,
        "logits_processor": [OnlyTheseTokens()],
        "stopping_criteria": [EndsWith([50, 51, 52])],
    },
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", FEATURES)
def test_accepting_everything_is_greedy_decoding(tiny_lm, tiny_tokenizer, ragged_batch, features, kind, option):
    lm = tiny_lm(kind, tie=kind != "qwen2")
    prompts = ragged_batch(LENGTHS)
    model = ProxyModelForCausalLM(lm, ProxyConfig(features=features, p_t=0.01))
    greedy = {"max_new_tokens": 24, "do_sample": False}
    plain = lm.generate(**prompts, **greedy)[:, max(LENGTHS) :]
    call = {"max_new_tokens": 24} | OPTIONS[option](plain, tiny_tokenizer)
    expected = lm.generate(**prompts, **({"do_sample": False} | call))
    if option != "plain" and option != "no EOS":
        assert expected[:, max(LENGTHS) :].tolist() != plain.tolist(), "the option makes no difference here"
    assert model.generate(**prompts, **call).tolist() == expected.tolist()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("features", "kind"), MORE_KINDS)
def test_accepting_everything_with_any_lm(tiny_lm, ragged_batch, features, kind, tie, attn):
    lm = tiny_lm(kind, tie=tie, attn=attn)
    model = ProxyModelForCausalLM(lm, ProxyConfig(features=features))
    prompts = ragged_batch(LENGTHS)
    expected = lm.generate(**prompts, max_new_tokens=24, do_sample=False, eos_token_id=MANY_EOS)
    assert model.generate(**prompts, max_new_tokens=24, eos_token_id=MANY_EOS).tolist() == expected.tolist()


@pytest.mark.parametrize("option", ["plain", "repetition_penalty", "no_repeat_ngram_size", "several EOS ids"])
@pytest.mark.parametrize("kind", KINDS)
def test_accepting_everything_in_bfloat16(tiny_lm, tiny_tokenizer, ragged_batch, kind, option):
    """Prefix features: token for token although logits tie in bfloat16."""
    lm = tiny_lm(kind, dtype=torch.bfloat16)
    prompts = ragged_batch(LENGTHS * 4)
    plain = lm.generate(**prompts, max_new_tokens=24, do_sample=False)[:, max(LENGTHS) :]
    call = {"max_new_tokens": 24} | OPTIONS[option](plain[:4], tiny_tokenizer)
    expected = lm.generate(**prompts, do_sample=False, **call)
    model = ProxyModelForCausalLM(lm, ProxyConfig(p_t=0.01, max_candidates=4))
    assert model.generate(**prompts, **call).tolist() == expected.tolist()


@pytest.mark.parametrize("features", FEATURES)
def test_prompts_without_a_mask(tiny_lm, ragged_batch, features):
    """`generate` of transformers reads the mask off the padding if none is given; so must the gated LM."""
    lm = tiny_lm("gpt2")
    prompts = ragged_batch(LENGTHS)
    expected = lm.generate(prompts["input_ids"], max_new_tokens=12, do_sample=False)
    assert expected.tolist() == lm.generate(**prompts, max_new_tokens=12, do_sample=False).tolist()
    model = ProxyModelForCausalLM(lm, ProxyConfig(features=features))
    assert model.generate(prompts["input_ids"], max_new_tokens=12).tolist() == expected.tolist()
    assert model.generate(**prompts, max_new_tokens=12).tolist() == expected.tolist()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("features", FEATURES)
def test_the_head_reads_contiguous_states(tiny_lm, ragged_batch, features, rows):
    """Of the strided last position of a prompt torch would copy the head's weights, for a single row, too."""
    lm, strides = tiny_lm("llama"), []
    model = ProxyModelForCausalLM(lm, ProxyConfig(features=features))
    lm.get_output_embeddings().register_forward_hook(lambda _module, args, _logits: strides.append(args[0].stride()))
    model.generate(**ragged_batch(LENGTHS[:rows]), max_new_tokens=3)
    size = lm.config.hidden_size
    assert len(strides) >= 3
    assert set(strides) <= {(size, size, 1), (size, 1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", FEATURES)
def test_several_sequences_per_prompt(tiny_lm, ragged_batch, with_random_gate, features, kind):
    """`num_return_sequences=3` is every prompt three times, in that order, for greedy and for sampled decisions."""
    prompts = ragged_batch(LENGTHS)
    model = with_random_gate(tiny_lm(kind), ProxyConfig(features=features, pooled_features=False, p_t=0.01))
    call = {"max_new_tokens": 10, "output_rollout": True, "tree": False}
    single = model.generate(**prompts, **call)
    several = model.generate(**prompts, **call, num_return_sequences=3)
    assert single.decisions.rank_sum.sum() > 5
    assert several.sequences.tolist() == single.sequences.repeat_interleave(3, 0).tolist()
    for ours, theirs in zip(several.decisions, single.decisions, strict=True):
        assert ours.tolist() == theirs.repeat_interleave(3).tolist()
    assert several.rollout.accept.tolist() == single.rollout.accept.repeat_interleave(3, 0).tolist()

    sampled = model.generate(**prompts, **call, num_return_sequences=8, gate_sample=True).sequences
    assert sampled.shape[0] == 8 * len(LENGTHS)
    assert sampled[:, : max(LENGTHS)].tolist() == prompts["input_ids"].repeat_interleave(8, 0).tolist()
    assert len({tuple(row) for row in sampled[:8].tolist()}) > 1


@pytest.mark.parametrize("features", FEATURES)
def test_several_sequences_of_one_token_prompts(tiny_lm, ragged_batch, with_random_gate, features):
    prompts = ragged_batch((1, 1))
    model = with_random_gate(tiny_lm(), ProxyConfig(features=features, p_t=0.01))
    expected = model.generate(**prompts, max_new_tokens=6).repeat_interleave(2, 0)
    assert model.generate(**prompts, max_new_tokens=6, num_return_sequences=2).tolist() == expected.tolist()


@pytest.mark.parametrize("features", FEATURES)
def test_several_sequences_by_a_generation_config(tiny_lm, ragged_batch, with_random_gate, features):
    prompts = ragged_batch(LENGTHS)
    model = with_random_gate(tiny_lm(), ProxyConfig(features=features, p_t=0.01))
    expected = model.generate(**prompts, max_new_tokens=6, num_return_sequences=2)
    config = GenerationConfig(max_new_tokens=6, num_return_sequences=2, do_sample=True)
    assert model.generate(**prompts, generation_config=config).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_several_sequences_in_bfloat16(tiny_lm, ragged_batch, kind):
    lm = tiny_lm(kind, dtype=torch.bfloat16)
    prompts = ragged_batch((9, 7, 8, 3))
    expected = lm.generate(**prompts, max_new_tokens=24, do_sample=False).repeat_interleave(3, 0)
    model = ProxyModelForCausalLM(lm, ProxyConfig())
    assert model.generate(**prompts, max_new_tokens=24, num_return_sequences=3).tolist() == expected.tolist()


@pytest.mark.parametrize("pooled", [False, True])
def test_several_sequences_from_a_state_space_lm(tiny_lm, ragged_batch, monkeypatch, pooled):
    """Its state is no cache of keys and values that could be shared: every sequence reads its prompt anew."""
    warnings = []
    monkeypatch.setattr(prefix.logger, "warning_once", warnings.append)
    lm, prompts = tiny_lm("mamba", attn="eager"), ragged_batch([7, 7])
    expected = lm.generate(**prompts, do_sample=False, max_new_tokens=12).repeat_interleave(3, dim=0)
    model = ProxyModelForCausalLM(lm, ProxyConfig(pooled_features=pooled))
    assert model.generate(**prompts, max_new_tokens=12, num_return_sequences=3).tolist() == expected.tolist()
    assert warnings == ["MambaForCausalLM cannot share what it has read: each sequence reads its prompt."]


@given(data=st.data())
@settings(max_examples=40)
def test_the_cache_that_grows_in_place_holds_what_transformers_does(tiny_lm, data):
    """Whatever is done to it, in any order."""
    config = tiny_lm().config
    ours, theirs = prefix_cache.growing_cache(tiny_lm()), DynamicCache(config=config)
    generator, rows = torch.Generator().manual_seed(0), 3
    operations = ["append", "append", "append", "crop", "choose rows", "reorder", "repeat", "reset"]
    for _ in range(data.draw(st.integers(1, 12))):
        length = theirs.get_seq_length()
        operation = data.draw(st.sampled_from(operations)) if length else "append"
        order = torch.randint(rows, (rows,), generator=generator)
        if operation == "append":
            shape = (rows, 2, data.draw(st.sampled_from([1, 1, 5, 40])), 16)
            for layer in range(config.num_hidden_layers):
                new = torch.randn(2, *shape, generator=generator)
                for mine, other in zip(ours.update(*new, layer), theirs.update(*new, layer), strict=True):
                    assert torch.equal(mine, other)
            continue
        for cache in (ours, theirs):
            if operation == "crop":
                cache.crop(-min(3, length - 1))
            elif operation == "choose rows":
                cache.batch_select_indices(order[: max(rows - 1, 1)])
            elif operation == "reorder":
                cache.reorder_cache(order)
            elif operation == "repeat":
                cache.batch_repeat_interleave(2)
            else:
                cache.reset()
        rows = {"choose rows": max(rows - 1, 1), "repeat": 2 * rows}.get(operation, rows)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_cache_grows_without_copying_what_it_holds(tiny_lm):
    layer = prefix_cache.growing_cache(tiny_lm()).layers[0]
    keys, _ = layer.update(*torch.randn(2, 3, 2, 20, 16))
    place = keys.data_ptr()
    for _ in range(32):
        keys, _ = layer.update(*torch.randn(2, 3, 2, 1, 16))
        assert keys.data_ptr() == place
    assert keys.shape == (3, 2, 52, 16)


def with_common_start(prompts: dict, lengths, common: int) -> dict:
    """The prompts, each of its length, with the same first tokens."""
    for row, length in enumerate(lengths):
        start = max(lengths) - length
        prompts["input_ids"][row, start : start + common] = torch.arange(4, 4 + common)
    return prompts


@given(data=st.data())
@settings(max_examples=40)
def test_prompts_that_begin_alike(tiny_lm, ragged_batch, with_random_gate, data):
    """The same tokens, states and mean states as when every prompt is read whole."""
    common = data.draw(st.integers(0, 9))
    lengths = [common + n for n in data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))]
    prompts = with_common_start(ragged_batch(lengths), lengths, common)
    config = ProxyConfig(p_t=0.02, pooled_features=data.draw(st.booleans()), feature_layers=[1, -1])
    model = with_random_gate(tiny_lm(data.draw(st.sampled_from([*KINDS, "gpt_neox", "mistral"]))), config, bias=-0.5)
    call = {"max_new_tokens": 6, "output_rollout": True, "num_return_sequences": data.draw(st.sampled_from([1, 3]))}
    with mock.patch.object(prefix_cache, "SHARED_TOKENS", 1):
        once = model.generate(**prompts, **call)
    with mock.patch.object(prefix_cache, "SHARED_TOKENS", 10**6):
        whole = model.generate(**prompts, **call)
    assert once.sequences.tolist() == whole.sequences.tolist()
    for name, ours, theirs in zip(once.rollout._fields, once.rollout, whole.rollout, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("repeats", "options", "read"), [(1, {}, 65), (4, {}, 80), (1, {"output_attentions": True}, 225)]
)
def test_what_prompts_begin_with_in_common_is_read_once(tiny_lm, ragged_batch, repeats, options, read):
    """A system prompt, say: 40 tokens of five prompts."""
    lengths = [45, 42, 41, 45, 43]
    lm, tokens = tiny_lm(), []
    model = ProxyModelForCausalLM(lm, ProxyConfig())
    prompts = with_common_start(ragged_batch(lengths), lengths, 40)
    hook = lm.model.register_forward_hook(
        lambda _m, _a, output: tokens.append(output.last_hidden_state.shape[:2].numel())
    )
    try:
        model.generate(**prompts, max_new_tokens=1, num_return_sequences=repeats, **options)
    finally:
        hook.remove()
    assert sum(tokens) == read


# 2. A row's output does not depend on its neighbours.


@pytest.mark.parametrize(("features", "kind"), MORE_KINDS)
def test_batch_equals_single(tiny_lm, ragged_batch, with_random_gate, features, kind):
    lengths = (9, 2, 6, 1, 4, 9, 3, 7)
    prompts = ragged_batch(lengths)
    lm = tiny_lm(kind, tie=kind != "gemma3")  # tied, it repeats itself
    model = with_random_gate(lm, ProxyConfig(features=features, p_t=0.02, max_candidates=4), bias=-0.5)
    # Without a tree, since the forwards that a row needs are compared too.
    call = {"max_new_tokens": 20, "eos_token_id": MANY_EOS[:4], "return_dict_in_generate": True, "tree": False}
    together = model.generate(**prompts, **call)
    responses = together.sequences[:, max(lengths) :]
    assert together.decisions.accepts.sum() > 5
    assert together.decisions.rank_sum.sum() > 5
    assert together.decisions.forced.sum() > 5
    assert len(set(together.decisions.tokens.tolist())) > 2, "rows of different lengths are what is hard"
    for row, length in enumerate(lengths):
        alone = model.generate(prompts["input_ids"][row : row + 1, -length:], **call)
        n = alone.sequences.shape[1] - length
        assert alone.sequences[0, length:].tolist() == responses[row, :n].tolist()
        assert responses[row, n:].eq(PAD).all()
        assert [x.item() for x in alone.decisions] == [x[row].item() for x in together.decisions]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_one_by_one_or_as_a_tree(tiny_lm, ragged_batch, with_random_gate, monkeypatch, kind, attn):
    """The same tokens and decisions, also if the way changes while some rows are in the middle of a position."""
    monkeypatch.setitem(candidate_loop.TREE_ROWS, ("cpu", torch.float32), 2)
    prompts = ragged_batch((9, 2, 6, 1, 4, 9))
    config = ProxyConfig(features="candidate", p_t=0.02, max_candidates=6)
    model = with_random_gate(tiny_lm(kind, attn=attn), config, bias=-0.5)
    call = {"max_new_tokens": 20, "eos_token_id": MANY_EOS[:4], "output_rollout": True}
    one_by_one, tree, automatic = (model.generate(**prompts, **call, tree=tree) for tree in (False, True, None))
    assert one_by_one.decisions.rank_sum.sum() > 20
    for other in (tree, automatic):
        assert other.sequences.tolist() == one_by_one.sequences.tolist()
        for name in set(other.decisions._fields) - {"lm_forwards"}:
            assert torch.equal(getattr(other.decisions, name), getattr(one_by_one.decisions, name)), name
        for name in other.rollout._fields:
            torch.testing.assert_close(
                getattr(other.rollout, name), getattr(one_by_one.rollout, name), atol=1e-4, rtol=0, msg=name
            )
    forwards = [x.decisions.lm_forwards.sum() for x in (one_by_one, automatic, tree)]
    assert forwards[0] > forwards[1] > forwards[2]


@pytest.mark.parametrize("features", FEATURES)
def test_more_padding_changes_nothing(tiny_lm, ragged_batch, with_random_gate, features):
    prompts = ragged_batch((5, 2))
    wide = {name: torch.nn.functional.pad(x, (11, 0)) for name, x in prompts.items()}
    for kind in KINDS:
        model = with_random_gate(tiny_lm(kind), ProxyConfig(features=features, p_t=0.02, max_candidates=6))
        narrow = model.generate(**prompts, max_new_tokens=16)
        assert model.generate(**wide, max_new_tokens=16)[:, 11:].tolist() == narrow.tolist()


# 3. A rejection leaves no trace.


@pytest.mark.parametrize(("features", "kind"), MORE_KINDS)
def test_a_rejection_leaves_no_trace(tiny_lm, ragged_batch, with_random_gate, features, kind):
    """What the gate read at every decision is what a fresh forward over the accepted tokens gives."""
    lm, k, new_tokens = tiny_lm(kind, tie=kind != "gemma3"), 4, 16
    prompts = ragged_batch(LENGTHS)
    # Exactly four candidates everywhere, so that three rejections mean that the fourth was accepted.
    config = ProxyConfig(features=features, pooled_features=False, p_t=1e-30, max_candidates=k)
    model = with_random_gate(lm, config, bias=-2.0)
    output = model.generate(**prompts, max_new_tokens=new_tokens, eos_token_id=-1, output_rollout=True)
    rollout, responses = output.rollout, output.sequences[:, max(LENGTHS) :]
    assert output.decisions.rank_sum.sum() > output.decisions.tokens.sum(), "more rejections than tokens"
    rejected = 0
    for row, length in enumerate(LENGTHS):
        prompt, response = prompts["input_ids"][row, -length:], responses[row]
        with torch.no_grad():
            fresh = lm(torch.cat([prompt, response])[None], output_hidden_states=True)
        position, rank = 0, 0
        for d in range(int(rollout.mask[row].sum())):
            token = rollout.token_ids[row, d]
            if features == "candidate":
                ids = torch.cat([prompt, response[:position], token[None]])
                with torch.no_grad():
                    expected = lm(ids[None], output_hidden_states=True).hidden_states[-1][0, -1]
            else:
                expected = fresh.hidden_states[-1][0, length + position - 1]
            found = rollout.hidden[row, rollout.hidden_index[row, d]]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            accepted = bool(rollout.accept[row, d])
            assert not accepted or token == response[position]
            rejected += not accepted
            position, rank = (position + 1, 0) if accepted or rank == k - 2 else (position, rank + 1)
        assert position == new_tokens
        log_probs = fresh.logits[0, length - 1 : -1].log_softmax(-1).gather(-1, response[:, None])
        torch.testing.assert_close(rollout.token_log_probs[row], log_probs.sum(), atol=1e-3, rtol=0)
    assert rejected > 40


@pytest.mark.parametrize("features", FEATURES)
def test_sliding_windows(tiny_lm, ragged_batch, with_random_gate, brute_force, features):
    """An LM that attends to its last 6 tokens alone: exact with prefix features, refused by name with the others."""
    prompts = ragged_batch(LENGTHS)
    config = ProxyConfig(features=features, p_t=0.02, max_candidates=6)
    if features == "candidate":
        with pytest.raises(ValueError, match="full attention in every layer, MistralForCausalLM has DynamicSliding"):
            ProxyModelForCausalLM(tiny_lm("mistral"), config)
        return
    model = with_random_gate(tiny_lm("mistral"), config)
    rows = brute_force.decode(model, **prompts, max_new_tokens=12)
    assert min(row.margin for row in rows) > MARGIN
    output = model.generate(**prompts, max_new_tokens=12, output_rollout=True)
    brute_force.check_output(output, rows, max(LENGTHS), PAD)


# 4. Fast equals brute force.


@st.composite
def cases(draw):
    return types.SimpleNamespace(
        kind=draw(st.sampled_from([*KINDS, "gpt_neox"])),
        lengths=draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)),
        seed=draw(st.integers(0, 1000)),
        max_new_tokens=draw(st.integers(1, 9)),
        eos=draw(st.sampled_from([[EOS], MANY_EOS])),
        p_t=draw(st.sampled_from([1e-4, 0.01, 0.05, 0.2, 0.6, 1.0])),
        p_t_mode=draw(st.sampled_from(["relative", "absolute"])),
        max_candidates=draw(st.sampled_from([1, 2, 3, 6, 16])),
        temperature=draw(st.sampled_from([0.5, 1.0, 1.5])),
        bias=draw(st.sampled_from([-4.0, -1.5, 0.0, 1.5])),
        scale=draw(st.sampled_from([0.5, 3.0])),
        threshold=draw(st.sampled_from([-1.0, 0.0, 0.7])),
        repetition_penalty=draw(st.sampled_from([None, 1.5])),
        pooled=draw(st.booleans()),
        layers=draw(st.sampled_from([[-1], [1], [0, -1], [-2, 0]])),
        tree=draw(st.booleans()),
    )


@pytest.mark.parametrize("features", FEATURES)
@given(case=cases())
@settings(max_examples=60)
def test_fast_equals_brute_force(tiny_lm, ragged_batch, with_random_gate, brute_force, features, case):
    """Tokens, counts and everything that training reads."""
    config = ProxyConfig(
        features=features,
        p_t=case.p_t,
        p_t_mode=case.p_t_mode,
        max_candidates=case.max_candidates,
        temperature=case.temperature,
        threshold=case.threshold,
        feature_layers=case.layers,
        pooled_features=case.pooled,
        gate_hidden_sizes=[32],
    )
    prompts = ragged_batch(case.lengths, case.seed)
    model = with_random_gate(tiny_lm(case.kind, seed=case.seed % 3), config, case.scale, case.bias, case.seed)
    processor = None
    if case.repetition_penalty is not None:
        processor = RepetitionPenaltyLogitsProcessor(case.repetition_penalty)
    rows = brute_force.decode(
        model,
        **prompts,
        max_new_tokens=case.max_new_tokens,
        eos_token_ids=case.eos,
        logits_processor=processor,
        tree=case.tree,
    )
    assume(min(row.margin for row in rows) > MARGIN)
    output = model.generate(
        **prompts,
        max_new_tokens=case.max_new_tokens,
        eos_token_id=case.eos,
        repetition_penalty=case.repetition_penalty,
        output_rollout=True,
        tree=case.tree,
    )
    brute_force.check_output(output, rows, max(case.lengths), PAD)


@pytest.mark.parametrize("features", FEATURES)
@given(case=cases())
@settings(max_examples=20)
def test_sampled_decisions_are_recorded_as_taken(tiny_lm, ragged_batch, with_random_gate, brute_force, features, case):
    """The brute force, told the recorded actions, ends at the same tokens, counts and features."""
    config = ProxyConfig(
        features=features,
        p_t=case.p_t,
        p_t_mode=case.p_t_mode,
        max_candidates=case.max_candidates,
        feature_layers=case.layers,
        pooled_features=case.pooled,
        gate_hidden_sizes=[32],
    )
    prompts = ragged_batch(case.lengths, case.seed)
    model = with_random_gate(tiny_lm(case.kind, seed=case.seed % 3), config, case.scale, case.bias, case.seed)
    torch.manual_seed(case.seed)
    output = model.generate(
        **prompts,
        max_new_tokens=case.max_new_tokens,
        eos_token_id=case.eos,
        gate_sample=True,
        output_rollout=True,
        tree=case.tree,
    )
    actions = [a[m].tolist() for a, m in zip(output.rollout.accept, output.rollout.mask, strict=True)]
    rows = brute_force.decode(
        model,
        **prompts,
        max_new_tokens=case.max_new_tokens,
        eos_token_ids=case.eos,
        replay=actions,
        tree=case.tree,
    )
    assume(min(row.margin for row in rows) > MARGIN)
    brute_force.check_output(output, rows, max(case.lengths), PAD)


@pytest.mark.parametrize("pad_token_id", [PAD, EOS])
@pytest.mark.parametrize(("features", "tree"), [("prefix", False), ("candidate", False), ("candidate", True)])
def test_rows_ended_by_a_stopping_criterion(
    tiny_lm, ragged_batch, with_random_gate, brute_force, features, tree, pad_token_id
):
    """Nothing after the stop is counted, also if the gate would have accepted the padding token."""
    lengths = (3, 5, 1, 4, 2, 6)
    stop_tokens = [5, 17, 29, 33, 48, 61, 70, 88]
    prompts = ragged_batch(lengths)
    lm = tiny_lm("llama", tie=False)
    with torch.no_grad():
        # The padding token is a probable one: after a stop it is often what would have come next.
        lm.lm_head.weight[pad_token_id] = lm.lm_head.weight[stop_tokens].sum(0)
    model = with_random_gate(lm, ProxyConfig(features=features, p_t=0.05, max_candidates=6))
    stop = EndsWith(stop_tokens)
    stops = lambda ids: bool(stop(ids[None], None))  # noqa: E731
    rows = brute_force.decode(model, **prompts, max_new_tokens=24, stop=stops, tree=tree)
    assert min(row.margin for row in rows) > MARGIN
    assert len({len(row.tokens) for row in rows}) > 2
    output = model.generate(
        **prompts,
        max_new_tokens=24,
        stopping_criteria=[stop],
        pad_token_id=pad_token_id,
        output_rollout=True,
        tree=tree,
    )
    brute_force.check_output(output, rows, max(lengths), pad_token_id)


class Watch(StoppingCriteria):
    """Keeps what it is asked of; ends the whole batch at a length, as a criterion may that keeps what it has seen."""

    def __init__(self, end: int):
        self.end, self.seen = end, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return input_ids.shape[1] >= self.end


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("features", FEATURES)
def test_a_criterion_is_asked_of_the_whole_batch_once_for_each_length(
    tiny_lm, ragged_batch, with_random_gate, features, tree
):
    """As in transformers, although with candidate features the rows reject differently; and nothing else changes."""
    prompts, width = ragged_batch(LENGTHS), max(LENGTHS)
    model = with_random_gate(tiny_lm("llama"), ProxyConfig(features=features, p_t=0.05, max_candidates=6))
    options = {"max_new_tokens": 24, "eos_token_id": MANY_EOS, "output_rollout": True, "tree": tree}
    alone = model.generate(**prompts, **options)
    assert len(set(alone.decisions.tokens.tolist())) > 2, "rows end at different lengths"
    watch = Watch(width + 100)
    watched = model.generate(**prompts, **options, stopping_criteria=[watch])
    assert torch.equal(watched.sequences, alone.sequences)
    assert torch.equal(watched.rollout.mask, alone.rollout.mask)
    for name in {*alone.decisions._fields} - {"lm_forwards"}:  # how wide a tree is depends on the other rows
        assert torch.equal(getattr(watched.decisions, name), getattr(alone.decisions, name)), name
    lengths = [ids.shape[1] for ids in watch.seen]
    assert lengths == list(range(width + 1, width + 1 + len(lengths)))
    assert lengths[-1] >= alone.sequences.shape[1] - 1
    assert all(torch.equal(ids, alone.sequences[:, : ids.shape[1]]) for ids in watch.seen)
    ended = model.generate(**prompts, **options, stopping_criteria=[Watch(width + 3)])
    assert torch.equal(ended.sequences, alone.sequences[:, : width + 3])
    assert torch.equal(ended.decisions.tokens, alone.decisions.tokens.clamp(max=3))


def test_a_stop_before_the_padding_token_is_not_counted_twice(tiny_lm, ragged_batch, brute_force):
    """The sharpest case of the test above: row 0 stops, and its next greedy token is the one that pads."""
    lm = tiny_lm("llama")
    prompts = ragged_batch((4, 4))
    plain = lm.generate(**prompts, max_new_tokens=6, do_sample=False)[:, 4:]
    stop_token, pad_token_id = plain[0, 1].item(), plain[0, 2].item()
    assert stop_token not in plain[1].tolist()
    for features in FEATURES:
        model = ProxyModelForCausalLM(lm, ProxyConfig(features=features))
        output = model.generate(
            **prompts,
            max_new_tokens=6,
            stopping_criteria=[EndsWith([stop_token])],
            pad_token_id=pad_token_id,
            output_rollout=True,
        )
        assert output.sequences[0, 4:].tolist() == plain[0, :2].tolist() + [pad_token_id] * 4
        assert output.decisions.tokens.tolist() == [2, 6], features
        assert output.rollout.mask.sum(-1).tolist() == [2, 6], features


@pytest.mark.parametrize("features", FEATURES)
def test_no_end_of_sequence_at_all(tiny_lm, ragged_batch, with_random_gate, brute_force, features):
    """`eos_token_id=None` at the call: the LM's own id is an ordinary token, in the record too."""
    prompts = ragged_batch(LENGTHS)
    lm = tiny_lm("llama", tie=False)
    with torch.no_grad():
        lm.lm_head.weight[EOS] = lm.lm_head.weight[20:30].sum(0)  # a frequent token
    model = with_random_gate(lm, ProxyConfig(features=features, p_t=0.05, max_candidates=6))
    rows = brute_force.decode(model, **prompts, max_new_tokens=12, eos_token_ids=())
    assert any(EOS in row.tokens[:-1] for row in rows)
    output = model.generate(**prompts, max_new_tokens=12, eos_token_id=None, output_rollout=True, tree=False)
    brute_force.check_output(output, rows, max(LENGTHS), PAD)


@pytest.mark.parametrize("features", FEATURES)
def test_bans_never_leave_a_row_without_a_token(tiny_lm, ragged_batch, with_random_gate, features):
    """A caller that bans everything gets the token that plain greedy decoding gives, and no decision is taken."""

    class BanAll(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf)

    lm = tiny_lm()
    prompts = ragged_batch(LENGTHS)
    model = with_random_gate(lm, ProxyConfig(features=features))
    call = {"max_new_tokens": 4, "logits_processor": [BanAll()], "eos_token_id": -1, "pad_token_id": PAD}
    output = model.generate(**prompts, **call, output_rollout=True)
    assert output.sequences.tolist() == lm.generate(**prompts, do_sample=False, **call).tolist()
    assert output.decisions.forced.tolist() == [4] * len(LENGTHS)
    assert not output.rollout.mask.any()
    assert output.rollout.token_log_probs.isfinite().all()


@pytest.mark.parametrize("features", FEATURES)
def test_one_candidate_asks_nothing(tiny_lm, ragged_batch, with_random_gate, features):
    """An episode without any decision: an empty mask, one unused column, greedy tokens whatever the gate thinks."""
    lm = tiny_lm()
    prompts = ragged_batch(LENGTHS)
    model = with_random_gate(lm, ProxyConfig(features=features, p_t=1.0), bias=-100.0)
    output = model.generate(**prompts, max_new_tokens=8, output_rollout=True)
    assert output.sequences.tolist() == lm.generate(**prompts, max_new_tokens=8, do_sample=False).tolist()
    assert output.rollout.mask.tolist() == [[False]] * len(LENGTHS)
    assert output.decisions.accepts.sum() == 0
    assert output.decisions.forced.tolist() == output.decisions.tokens.tolist() == output.decisions.proposals.tolist()
    assert output.decisions.lm_forwards.tolist() == output.decisions.tokens.tolist()
    assert model.rollout_features(output.rollout).shape[0] == 0


@pytest.mark.parametrize("features", FEATURES)
def test_rollout_features_are_what_the_gate_read(tiny_lm, ragged_batch, with_random_gate, brute_force, features):
    """The features rebuilt from a rollout give back the accept logits, and so the actions."""
    prompts = ragged_batch(LENGTHS)
    config = ProxyConfig(features=features, pooled_features=False, p_t=0.02, max_candidates=6, threshold=0.3)
    model = with_random_gate(tiny_lm(), config)
    rollout = model.generate(**prompts, max_new_tokens=12, output_rollout=True).rollout
    logits = model.gate(model.rollout_features(rollout))
    assert logits.shape == (int(rollout.mask.sum()),)
    assert torch.equal(logits >= 0.3, rollout.accept[rollout.mask])
    rows = brute_force.decode(model, **prompts, max_new_tokens=12)
    embeddings = model.get_input_embeddings().weight
    parts = lambda d: [d.hidden, embeddings[d.token_id]] if features == "prefix" else [d.hidden]  # noqa: E731
    scalars = lambda d: d.scalars if features == "prefix" else ()  # noqa: E731
    expected = [brute_force.gate_logit(model.gate, parts(d), scalars(d)) for row in rows for d in row.decisions]
    torch.testing.assert_close(logits, torch.tensor(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize("features", FEATURES)
def test_rollouts_in_bfloat16(tiny_lm, ragged_batch, with_random_gate, features):
    """Features are cached in the LM's dtype without loss: they give back every greedy action exactly."""
    model = with_random_gate(tiny_lm(dtype=torch.bfloat16), ProxyConfig(features=features, p_t=0.02))
    rollout = model.generate(**ragged_batch(LENGTHS * 3), max_new_tokens=12, output_rollout=True).rollout
    assert rollout.hidden.dtype == torch.bfloat16
    assert (rollout.scalars.dtype, rollout.lm_log_probs.dtype) == (torch.float32, torch.float32)
    accept_logits = model(gate_features=model.rollout_features(rollout)).accept_logits
    assert accept_logits.dtype == torch.float32
    # Another batch of the same rows: the sums of a matrix product come in another order.
    close = accept_logits.abs() < 1e-4
    assert close.sum() <= 2
    assert torch.equal((accept_logits >= 0)[~close], rollout.accept[rollout.mask][~close])
    assert 10 < rollout.accept.sum() < rollout.mask.sum() - 10


def test_threshold_at_the_call_goes_before_the_configuration(tiny_lm, ragged_batch, with_random_gate):
    prompts = ragged_batch(LENGTHS)
    for features in FEATURES:
        model = with_random_gate(tiny_lm(), ProxyConfig(features=features, p_t=0.01, threshold=1e9))
        run = lambda **kwargs: model.generate(**prompts, max_new_tokens=8, return_dict_in_generate=True, **kwargs)  # noqa: B023, E731
        assert run().decisions.accepts.sum() == 0
        assert run(threshold=-1e9).decisions.rank_sum.sum() == 0
        some = run(threshold=0.0).decisions
        assert some.accepts.sum() > 0
        assert some.rank_sum.sum() > 0


# 5. Sampled decisions.


@pytest.mark.parametrize("proposal", ["ranked", "sampled"])
@pytest.mark.parametrize("features", FEATURES)
def test_the_seed_fixes_sampled_decisions(tiny_lm, ragged_batch, with_random_gate, features, proposal):
    prompts = ragged_batch(LENGTHS)
    model = with_random_gate(tiny_lm(), ProxyConfig(features=features, p_t=0.01, proposal=proposal), scale=1.0)

    def run(seed):
        torch.manual_seed(seed)
        return model.generate(**prompts, max_new_tokens=12, gate_sample=True, output_rollout=True)

    first, again, other = run(1), run(1), run(2)
    assert first.sequences.tolist() == again.sequences.tolist()
    for name in first.rollout._fields:
        assert torch.equal(getattr(first.rollout, name), getattr(again.rollout, name)), name
    assert first.sequences.tolist() != other.sequences.tolist()


@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_closed_form_equals_frequencies_of_sequential_decisions(
    tiny_lm, ragged_batch, with_random_gate, threshold, pooled_chisquare
):
    """`forward`'s gated logits against 6,000 first and second tokens drawn by `generate`, one decision at a time."""
    n = 6_000
    config = ProxyConfig(p_t=0.05, max_candidates=6, threshold=threshold)
    model = with_random_gate(tiny_lm(), config, scale=0.7, bias=-0.3)
    prompt = ragged_batch((4,))["input_ids"]
    with torch.no_grad():
        first = model(prompt).logits[0, -1].double().exp()
    output = model.generate(
        prompt.expand(n, -1), max_new_tokens=2, gate_sample=True, eos_token_id=-1, pad_token_id=PAD
    )
    drawn = output[:, 4:]
    assert pooled_chisquare(np.bincount(drawn[:, 0], minlength=96), first) > 1e-3
    # The second token given the most frequent first one.
    top = int(drawn[:, 0].mode().values)
    with torch.no_grad():
        second = model(torch.cat([prompt, torch.tensor([[top]])], 1)).logits[0, -1].double().exp()
    assert pooled_chisquare(np.bincount(drawn[drawn[:, 0] == top, 1], minlength=96), second) > 1e-3


def test_sequential_decisions_with_candidate_features(
    tiny_lm, ragged_batch, with_random_gate, brute_force, pooled_chisquare
):
    """The same law, with accept probabilities that need a forward per candidate."""
    n = 4_000
    model = with_random_gate(
        tiny_lm(), ProxyConfig(features="candidate", pooled_features=False, max_candidates=5), scale=0.7, bias=-0.3
    )
    prompt = ragged_batch((4,))["input_ids"]
    logits, _ = brute_force.run_lm(model.lm, prompt[0].tolist())
    token_ids, _, _ = brute_force.form_candidates(logits.detach(), model.proxy_config)
    left, probabilities = 1.0, np.zeros(96)
    for rank, token in enumerate(token_ids):
        _, hidden = brute_force.run_lm(model.lm, [*prompt[0].tolist(), token])
        logit = torch.tensor(brute_force.gate_logit(model.gate, [hidden[-1]]))
        accept = 1.0 if rank == len(token_ids) - 1 else torch.sigmoid(logit).item()
        probabilities[token] = left * accept
        left *= 1.0 - accept
    drawn = model.generate(prompt.expand(n, -1), max_new_tokens=1, gate_sample=True)[:, 4]
    assert pooled_chisquare(np.bincount(drawn, minlength=96), probabilities) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("features", FEATURES)
def test_sampled_proposals_all_accepted_sample_the_truncated_lm(
    tiny_lm, ragged_batch, features, temperature, pooled_chisquare
):
    n = 6_000
    lm = tiny_lm(seed=1)
    config = ProxyConfig(features=features, proposal="sampled", p_t=0.1, temperature=temperature)
    model = ProxyModelForCausalLM(lm, config)
    prompt = ragged_batch((4,))["input_ids"]
    with torch.no_grad():
        p = (lm(prompt).logits[0, -1].double() / temperature).softmax(-1)
    p = torch.where(p >= 0.1 * p.max(), p, 0.0)
    assert 3 < (p > 0).sum() <= 16
    drawn = model.generate(prompt.expand(n, -1), max_new_tokens=1)[:, 4]
    assert pooled_chisquare(np.bincount(drawn, minlength=96), p) > 1e-3


@pytest.mark.parametrize("features", FEATURES)
def test_temperature_at_the_call_is_that_of_the_proposals(tiny_lm, ragged_batch, with_random_gate, features):
    prompts = ragged_batch(LENGTHS)
    warm, cold = (
        with_random_gate(tiny_lm(), ProxyConfig(features=features, p_t=0.05, temperature=t)) for t in (1.0, 0.3)
    )
    call = {"max_new_tokens": 12, "output_rollout": True}
    expected = cold.generate(**prompts, **call)
    found = warm.generate(**prompts, **call, temperature=0.3)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert torch.equal(found.rollout.scalars, expected.rollout.scalars)
    assert found.sequences.tolist() != warm.generate(**prompts, **call).sequences.tolist()
    assert warm.proxy_config.temperature == 1.0


# What `generate` promises besides tokens.


@pytest.mark.parametrize("features", FEATURES)
def test_streaming_gives_the_tokens_as_they_are_accepted(tiny_lm, ragged_batch, with_random_gate, features):
    class Collect:
        def __init__(self):
            self.chunks, self.ended = [], False

        def put(self, value):
            self.chunks.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    prompt = ragged_batch((4,))["input_ids"]
    model = with_random_gate(tiny_lm(), ProxyConfig(features=features, p_t=0.01))
    streamer = Collect()
    sequence = model.generate(prompt, max_new_tokens=12, eos_token_id=-1, pad_token_id=PAD, streamer=streamer)[0]
    assert streamer.chunks[0] == prompt[0].tolist()
    assert streamer.chunks[1:] == [[token] for token in sequence[4:].tolist()]
    assert streamer.ended


def test_the_lms_own_logits_stay_at_hand(tiny_lm, ragged_batch, with_random_gate):
    """`output_logits=True` returns the LM's raw logits as in every `generate`; the gate must not write into them."""
    lm = tiny_lm()
    prompt = ragged_batch((4,))["input_ids"]
    model = with_random_gate(lm, ProxyConfig(p_t=0.01))
    output = model.generate(prompt, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        expected = lm(output.sequences[:, :-1]).logits[0, 3:]
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], expected, atol=1e-4, rtol=0)


def test_a_processor_that_runs_the_lm_does_not_mislead_the_gate(tiny_lm, ragged_batch, with_random_gate):
    """Classifier-free guidance runs the LM a second time within a step: the gate still reads the first run's hidden
    state, or the option is refused by name."""
    lm = tiny_lm()
    prompt = ragged_batch((4,))["input_ids"]
    model = with_random_gate(lm, ProxyConfig(p_t=0.01))
    try:
        output = model.generate(prompt, max_new_tokens=5, guidance_scale=1.5, output_rollout=True)
    except ValueError as error:
        assert "guidance_scale" in str(error)  # noqa: PT017
        return
    with torch.no_grad():
        expected = lm(output.sequences[:, :-1], output_hidden_states=True).hidden_states[-1][0, 3:]
    torch.testing.assert_close(output.rollout.hidden[0], expected, atol=1e-4, rtol=0)


def test_forwards_per_token(tiny_lm, ragged_batch, with_random_gate):
    """Prefix features cost one forward per token whatever is rejected; the LM is really called that often."""
    prompts = ragged_batch((4,))
    lm = tiny_lm()
    calls = []
    hook = lm.register_forward_hook(lambda *args: calls.append(1))
    for features in FEATURES:
        model = with_random_gate(lm, ProxyConfig(features=features, p_t=0.01, max_candidates=5), bias=-1.0)
        calls.clear()
        output = model.generate(**prompts, max_new_tokens=20, return_dict_in_generate=True)
        decisions = output.decisions
        assert decisions.rank_sum > 10
        assert len(calls) == decisions.lm_forwards.item(), features
        if features == "prefix":
            assert decisions.lm_forwards == decisions.tokens
    hook.remove()


def test_processor_lists_of_transformers_are_taken(tiny_lm, ragged_batch):
    lm = tiny_lm()
    prompts = ragged_batch(LENGTHS)
    processors = LogitsProcessorList([OnlyTheseTokens()])
    expected = lm.generate(**prompts, max_new_tokens=8, do_sample=False, logits_processor=processors)
    for features in FEATURES:
        model = ProxyModelForCausalLM(lm, ProxyConfig(features=features))
        assert model.generate(**prompts, max_new_tokens=8, logits_processor=processors).tolist() == expected.tolist()
    assert len(processors) == 1, "the caller's list is left alone"
