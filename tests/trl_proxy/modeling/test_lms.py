"""LMs that are wrapped, cast, resized or of unusual kinds; test_architectures.py has the plain ones."""

import peft
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_proxy import ProxyConfig, ProxyModelForCausalLM
from trl_proxy.decoding.hidden_states import HiddenStateHook, record_body

ALL = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "LoRA": peft.LoraConfig(**ALL, init_lora_weights=False),
    "LoRA of every layer": peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False
    ),
    "LoRA of embeddings": peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"], init_lora_weights=False
    ),
    "LoRA of the head": peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False
    ),
    "single tokens": peft.LoraConfig(**ALL, trainable_token_indices=[5, 6], init_lora_weights=False),
    "whole embeddings": peft.LoraConfig(**ALL, modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False),
    "DoRA": peft.LoraConfig(**ALL, use_dora=True, init_lora_weights=False),
    "IA3": peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
    "LoHa": peft.LoHaConfig(**ALL, init_weights=False),
    "OFT": peft.OFTConfig(**ALL, init_weights=False),
    "VeRA": peft.VeraConfig(**ALL, init_weights=False),
    "LN": peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "adaption prompt": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
}
KINDS = {
    "prefix": {"pooled_features": False},
    "pooled": {"pooled_features": True},
    "candidate": {"features": "candidate"},
}
NEW = {"max_new_tokens": 6}


def check_equals(lm, batch, **options) -> ProxyModelForCausalLM:
    """A new gate decodes as the LM itself, one sequence or two of each prompt."""
    model = ProxyModelForCausalLM(lm, ProxyConfig(p_t=1e-3, **options))
    expected = lm.generate(**batch, **NEW, do_sample=False)
    assert torch.equal(model.generate(**batch, **NEW), expected)
    twice = {key: value.repeat_interleave(2, dim=0) for key, value in batch.items()}
    expected = lm.generate(**twice, **NEW, do_sample=False)
    assert torch.equal(model.generate(**batch, **NEW, num_return_sequences=2), expected)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter, kind, tiny_lm, ragged_batch):
    lm = peft.get_peft_model(tiny_lm("llama", tie=False), ADAPTERS[adapter])
    model = check_equals(lm, ragged_batch([5, 9]), **KINDS[kind])
    ids = torch.tensor([[5, 6, 7]])
    if kind != "candidate":
        assert torch.equal(model(input_ids=ids).logits.argmax(-1), lm(input_ids=ids).logits.argmax(-1))
    with HiddenStateHook(lm) as states, record_body(lm) as body:
        hidden = lm(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(states.hidden, hidden)
    assert len(body) == 1
    assert torch.equal(body[0], hidden)


@pytest.mark.fault
@pytest.mark.parametrize("adapter", [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig])
def test_virtual_tokens(adapter, tiny_lm):
    lm = peft.get_peft_model(tiny_lm("llama"), adapter(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="puts virtual tokens before every text: use an adapter of the weights"):
        ProxyModelForCausalLM(lm)


@pytest.mark.fault
def test_no_causal_lm(tiny_lm):
    small = {"d_model": 16, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        ProxyModelForCausalLM(T5ForConditionalGeneration(T5Config(**small)))
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 96}
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder model"):
        ProxyModelForCausalLM(BartForConditionalGeneration(BartConfig(**small)))
    config = tiny_lm("llama").config
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no language modelling head"):
        ProxyModelForCausalLM(AutoModelForSequenceClassification.from_config(config))
    with pytest.raises(ValueError, match="LlamaModel has no language modelling head"):
        ProxyModelForCausalLM(LlamaModel(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1})))


@pytest.mark.parametrize("kind", KINDS)
def test_cast(kind, tiny_lm, ragged_batch, with_random_gate, tmp_path):
    """`to` casts the LM. The gate stays in float32, bit by bit, and still decides."""
    lm, batch = tiny_lm("llama"), ragged_batch([5, 9])
    model = with_random_gate(lm, ProxyConfig(p_t=1e-3, **KINDS[kind]))
    before = {name: value.clone() for name, value in model.proxy.state_dict().items()}
    for cast in (lambda: model.to(torch.bfloat16), model.half, model.bfloat16):
        cast()
        assert lm.dtype in (torch.bfloat16, torch.float16)
        for name, value in model.proxy.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name])
    decoded = model.generate(**batch, **NEW)
    again = with_random_gate(tiny_lm("llama", dtype=torch.bfloat16), ProxyConfig(p_t=1e-3, **KINDS[kind]))
    again.lm.load_state_dict(lm.state_dict())
    assert torch.equal(again.generate(**batch, **NEW), decoded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False])
def test_resized_embeddings(tie, kind, tiny_lm, ragged_batch):
    lm, batch = tiny_lm("llama", tie=tie), ragged_batch([5, 9])
    lm.resize_token_embeddings(130)
    model = check_equals(lm, batch, **KINDS[kind])
    lm.resize_token_embeddings(120)
    assert torch.equal(model.generate(**batch, **NEW), lm.generate(**batch, **NEW, do_sample=False))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cache_of_the_caller(cache, pooled, tiny_lm, ragged_batch, with_random_gate):
    batch = ragged_batch([5, 9])
    model = with_random_gate(tiny_lm("llama"), ProxyConfig(p_t=1e-3, pooled_features=pooled))
    expected = model.generate(**batch, **NEW)
    assert torch.equal(model.generate(**batch, **NEW, cache_implementation=cache), expected)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("option", [{"use_cache": False}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 5}])
def test_text_in_other_parts(option, pooled, tiny_lm, ragged_batch, with_random_gate):
    """Whether the LM reads the text at once, in parts, or again at every token, the gate reads the same."""
    batch = ragged_batch([5, 9])
    model = with_random_gate(tiny_lm("llama"), ProxyConfig(p_t=1e-3, pooled_features=pooled))
    expected = model.generate(**batch, **NEW, output_rollout=True)
    output = model.generate(**batch, **NEW, **option, output_rollout=True)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.rollout.hidden, expected.rollout.hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_opt_with_projections(kind, ragged_batch):
    """Of OPT-350m the head reads less than the layers write."""
    config = OPTConfig(
        vocab_size=96,
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.2,
    )
    torch.manual_seed(0)
    model = check_equals(OPTForCausalLM(config).eval(), ragged_batch([5, 9]), **KINDS[kind])
    assert (model.proxy_config.hidden_size, model.proxy_config.embedding_size) == (32, 32)


@pytest.mark.parametrize("kind", ["prefix", "pooled"])
@pytest.mark.parametrize("config_class", [Qwen2_5_VLConfig, Qwen2VLConfig])
def test_images_lm_with_text_alone(config_class, kind, ragged_batch):
    config = config_class(
        text_config={
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64},
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    torch.manual_seed(0)
    lm = AutoModelForImageTextToText.from_config(config).eval()
    model = check_equals(lm, ragged_batch([5, 9]), **KINDS[kind])
    ids = torch.tensor([[5, 6, 7]])
    with record_body(lm) as body:
        output, plain = model(input_ids=ids), lm(input_ids=ids)
    assert [states.shape for states in body] == [(1, 3, 64)] * 2, "one for each forward, of two modules that return it"
    assert type(output) is type(plain)
    assert [*output] == [*plain]
    assert torch.equal(output.logits.argmax(-1), plain.logits.argmax(-1))


def test_fields_of_experts(ragged_batch):
    """The routers' logits and their loss pass through."""
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    lm = MixtralForCausalLM(config).eval()
    before = config.to_dict(), config._experts_implementation
    model = ProxyModelForCausalLM(lm)
    assert (config.to_dict(), config._experts_implementation) == before, "the LM's own settings stay"
    batch = ragged_batch([9])
    with torch.no_grad():
        proposed = lm(**batch).logits.argmax(-1).roll(1, -1)  # a label that is no candidate has an infinite loss
    asked = {"output_router_logits": True, "output_hidden_states": True, "labels": proposed}
    plain, gated = lm(**batch, **asked), model(**batch, **asked)
    assert [*gated] == [*plain]
    assert torch.equal(gated.aux_loss, plain.aux_loss)
    for name in ("router_logits", "hidden_states"):
        assert all(map(torch.equal, gated[name], plain[name]))
    assert torch.equal(gated[0], gated.loss)
    in_tuple = model(**batch, **asked, return_dict=False)
    assert torch.equal(in_tuple[0], gated.loss)
    assert torch.equal(in_tuple[2], gated.logits), "loss, auxiliary loss, logits"
