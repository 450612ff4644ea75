"""Every architecture of causal LM that transformers has, tiny and random: a gate on it decodes as the LM itself does.

`ARCHITECTURES=all` tests all of them, else some forty. With `ARCHITECTURES_PAGE=docs/architectures.md` what was found
is written there: `make architectures` does both.
"""

import inspect
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trl_proxy import ProxyConfig, ProxyModelForCausalLM

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
# The name of each class, and the first `model_type` that it is registered for.
ARCHITECTURES = {name: kind for kind, name in reversed(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()) if kind != "proxy"}
# What no gate is tried on, and why.
SKIPPED = {
    "BltForCausalLM": "its patches of bytes have no tiny configuration that runs",
    "Gemma3nForConditionalGeneration": "needs timm",
    "Gemma4AssistantForCausalLM": "drafts for another LM, whose cache it reads",
    "Gemma4UnifiedAssistantForCausalLM": "drafts for another LM, whose cache it reads",
    "MusicgenForCausalLM": "writes several streams of audio tokens at once",
    "MusicgenMelodyForCausalLM": "writes several streams of audio tokens at once",
}
# Tested always: the best known, and some of every kind of cache, head and body.
USUAL = [
    *["Llama", "Mistral", "Ministral3", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Gemma4", "Phi", "Phi3", "Olmo2"],
    *["SmolLM3", "Granite", "Glm4", "Cohere2", "Falcon", "GPTNeoX", "GPTJ", "Bloom", "Mpt", "OPT", "Bart"],
    *["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss", "DeepseekV3", "Llama4"],
    *["Mamba", "Mamba2", "Jamba", "Bamba", "FalconH1", "NemotronH", "Qwen3Next", "GraniteMoeHybrid"],
    *["RecurrentGemma", "Zamba2", "Lfm2"],
]
USUAL = [f"{name}ForCausalLM" for name in USUAL] + ["GPT2LMHeadModel", "XLNetLMHeadModel", "BertLMHeadModel"]

# Small values of the fields that configurations commonly have. A field that a configuration lacks is left out.
SIZES = {
    "vocab_size": 96,
    "decoder_vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "type_vocab_size": 1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
    "is_decoder": True,
    "max_position_embeddings": 64,
    # Large, so that the outputs of an untrained model vary.
    "initializer_range": 0.2,
    "init_std": 0.2,
    # Widths
    **dict.fromkeys(["hidden_size", "d_model", "embedding_size", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "ffn_hidden_size"], 96),
    **dict.fromkeys(["num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    "head_dim": 16,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    "hidden_size_per_layer_input": 8,
    # Depths
    **dict.fromkeys(["num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["encoder_layers", "num_encoder_layers", "depth"], 1),
    # Latent attention
    "q_lora_rank": 32,
    **dict.fromkeys(["kv_lora_rank", "v_head_dim", "qk_head_dim"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim"], 8),
    **dict.fromkeys(["index_head_dim", "index_topk"], 16),
    "index_n_heads": 2,
    # Experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"], 32),
    **dict.fromkeys(["shared_expert_intermediate_size", "shared_experts_intermediate_size"], 32),
    "moe_shared_expert_intermediate_size": 32,
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    # Windows, shorter than the texts below
    **dict.fromkeys(["sliding_window", "sliding_window_size", "local_attention", "attention_window_size"], 6),
    "window_size": 6,
    "attention_chunk_size": 8,
    "max_window_layers": 1,
    # State spaces
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size"], 8),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(["n_groups", "mamba_n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 8),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 16),
    **dict.fromkeys(["linear_num_key_heads"], 2),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_heads"], 4),
    # Images
    **dict.fromkeys(["patch_size", "temporal_patch_size"], 2),
    "image_size": 8,
}
# What single architectures need besides.
HYBRID = ["linear_attention", "full_attention"]
OVERRIDES: dict[str, dict] = {
    "DbrxForCausalLM": {
        "ffn_config": {"moe_top_k": 2, "ffn_hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128},
    "CohereCompassForCausalLM": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 8,
    },
    "LongcatFlashForCausalLM": {"head_dim": 8, "zero_expert_num": 2},
    "ProphetNetForCausalLM": {"num_encoder_layers": 2},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "xLSTMForCausalLM": {"hidden_size": 128, "num_heads": 4},
    "BltForCausalLM": {
        "encoder_hash_byte_group_vocab": 96,
        "encoder_hash_byte_group_size": [3],
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "CpmAntForCausalLM": {"dim_head": 16, "dim_ff": 96, "prompt_length": 4},
    "CTRLLMHeadModel": {"dff": 96},
    "RoCBertForCausalLM": {"shape_vocab_size": 96, "pronunciation_vocab_size": 96},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "GraniteMoeHybridForCausalLM": {"layer_types": HYBRID, "mamba_d_head": 16},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "ZambaForCausalLM": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "Zamba2ForCausalLM": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "n_mamba_heads": 8},
    "ZayaForCausalLM": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "attention_head_size": 16,
        "feed_forward_size": 96,
        "hash_seed": 0,
    },
}


def small(config, class_name: str = "") -> dict:
    """Arguments that make a small configuration of the same class as `config`."""
    fields = set(config.to_dict()) | set(config.attribute_map)
    given = OVERRIDES.get(class_name, {})

    def settable(name: str) -> bool:
        target = inspect.getattr_static(type(config), config.attribute_map.get(name, name), None)
        return name in fields and not (isinstance(target, property) and target.fset is None)

    sizes = {name: value for name, value in SIZES.items() if settable(name)}
    if "qk_rope_head_dim" in fields:  # latent attention: as many keys as queries
        sizes = {**sizes, "num_key_value_heads": 4}
        sizes.pop("head_dim", None)
    # A layer of each kind
    kinds = {}
    for name in ("layer_types", "mlp_layer_types", "block_types", "indexer_types", "layers_block_type"):
        value = given.get(name, getattr(config, name, None))
        if settable(name) and isinstance(value, (list, tuple)) and value:
            kinds[config.attribute_map.get(name, name)] = list(value if name in given else dict.fromkeys(value))
    depth = max([2, *map(len, kinds.values())])
    if settable("num_hidden_layers"):
        sizes["num_hidden_layers"] = depth
    sizes |= {name: value + value[-1:] * (depth - len(value)) for name, value in kinds.items()}
    sizes = {config.attribute_map.get(name, name): value for name, value in sizes.items()}
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            sizes[name] = {**small(part), "model_type": part.model_type} | given.get(name, {})
    return sizes | {name: value for name, value in given.items() if name not in config.sub_configs}


def tiny(class_name: str):
    """A random LM of this class."""
    model_class = getattr(transformers, class_name)
    config_class = model_class.config_class
    torch.manual_seed(0)
    return model_class(config_class(**small(config_class(), class_name))).eval()


NEW_TOKENS = 4
PROPOSALS = {"max_candidates": 8, "p_t": 1e-5, "gate_hidden_sizes": [32]}
KINDS: dict[str, dict] = {
    "prefix features": {"pooled_features": False},
    "pooled features": {"pooled_features": True},
    "candidate features": {"features": "candidate"},
}


@torch.no_grad()
def decode_by_forward(model, ids: torch.Tensor) -> list[int]:
    """The greedy decisions for one text, read off the distribution of `forward` over the whole text at every token."""
    response: list[int] = []
    while len(response) < NEW_TOKENS and 2 not in response:
        output = model(input_ids=ids, use_cache=False, output_lm_logits=True)
        probabilities, order = output.logits[0, -1].exp(), output["lm_logits"][0, -1].argsort(descending=True)
        *candidates, last = [token for token in order.tolist() if probabilities[token] > 0]
        left, accepted = 1.0, last
        for token in candidates:
            if probabilities[token] / left >= 0.5:
                accepted = token
                break
            left = left - probabilities[token]
        response.append(accepted)
        ids = torch.cat([ids, ids.new_tensor([[accepted]])], dim=1)
    return response


@torch.no_grad()
def check_forward(model, lm, ids: torch.Tensor) -> None:
    """The output of an untrained gate is the LM's, with other logits of the same best tokens."""
    plain, gated = lm(input_ids=ids), model(input_ids=ids, output_lm_logits=True)
    assert [*gated] == [*plain, "lm_logits"]
    assert type(gated) is type(plain)
    assert torch.equal(gated["lm_logits"], plain.logits)
    assert torch.equal(gated.logits.argmax(-1), plain.logits.argmax(-1))
    torch.testing.assert_close(gated.logits.exp().sum(-1), torch.ones(ids.shape))
    assert torch.equal(model(input_ids=ids, return_dict=False)[0], gated.logits)


def checked(name: str, ragged_batch, with_random_gate, folder) -> dict[str, str]:
    """What a gate on this architecture can do, after it was held against the LM itself."""
    lm = tiny(name)
    batch = ragged_batch([8, 11])  # longer than the windows
    first = {key: value[:1] for key, value in batch.items()}
    alone = {key: value[:, 3:] for key, value in first.items()}
    twice = {key: value.repeat_interleave(2, dim=0) for key, value in batch.items()}
    new = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    plain, plain_twice = (lm.generate(**x, **new, do_sample=False).sequences for x in (batch, twice))
    # Some LMs decode otherwise with padding, with a cache or in `generate`, whether they have a gate or not.
    logits = [
        torch.stack(lm.generate(**x, **new, do_sample=False, output_logits=True).logits)
        for x in (alone, first, {**alone, "use_cache": False})
    ]
    exact_padding, exact_cache = (
        x.shape == logits[0].shape and torch.allclose(x, logits[0], atol=1e-3) for x in logits[1:]
    )
    with torch.no_grad():
        exact_forward = torch.allclose(lm(**alone).logits[:, -1], logits[0][0], atol=1e-3)
    can = {}
    for kind, options in KINDS.items():
        try:
            model = ProxyModelForCausalLM(lm, ProxyConfig(**PROPOSALS, **options))
            decoded = model.generate(**batch, **new).sequences
        except ValueError as error:
            refusal = str(error)
            need = re.fullmatch(r"Pooled features (must .*)\. Leave .*|Candidate features (need .*): use .*", refusal)
            can[kind] = f"refused: {(need[1] or need[2]).replace(name, 'it')}"
            continue
        if kind != "candidate features":
            check_forward(model, lm, alone["input_ids"])
        assert torch.equal(decoded, plain)
        assert torch.equal(model.generate(**batch, **new, num_return_sequences=2).sequences, plain_twice)

        # A gate that rejects about half of what an accepting one takes
        model = with_random_gate(lm, model.proxy_config, bias=100.0)
        rollout = model.generate(**alone, **new, output_rollout=True).rollout
        with torch.no_grad():
            model.gate.mlp[-1].bias -= model.gate(model.rollout_features(rollout)).mean() + 1e-3
        output = model.generate(**alone, **new)
        assert output.decisions.rank_sum.sum() > 0
        if exact_cache and exact_forward and kind != "candidate features":
            assert decode_by_forward(model, alone["input_ids"]) == output.sequences[0, 8:].tolist()
            assert torch.equal(model.generate(**alone, **new, use_cache=False).sequences, output.sequences)
        response = output.sequences[0, 8:].tolist()
        if exact_padding and 0 not in response:  # some take any padding token for padding
            padded = model.generate(**batch, **new).sequences[0, 11:].tolist()
            assert padded == response + [0] * (len(padded) - len(response))
        model.save_pretrained(folder)
        loaded = ProxyModelForCausalLM.from_pretrained(lm, folder)
        assert torch.equal(loaded.generate(**alone, **new).sequences, output.sequences)
        can[kind] = "yes"
    return can


COLUMNS = ["prefix features", "pooled features", "several sequences", "candidate features"]


@pytest.fixture(scope="module")
def records():
    """What each architecture can do, by name; at the end it is written into the page, if there is to be one."""
    records: dict[str, dict[str, str]] = {}
    yield records
    if page := os.environ.get("ARCHITECTURES_PAGE"):
        text = Path(page).read_text(encoding="utf-8")
        known = dict(re.findall(r"^\| \S+ \| (\w+) \| (.*) \|$", text, re.MULTILINE))  # of those not tried this time
        before, _, rest = text.partition("<!-- table: architectures -->\n")
        lines = [f"| `model_type` | class | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 2) + "|"]
        for name in sorted(ARCHITECTURES):
            cells = known.get(name, " | | |")
            if name in SKIPPED:
                cells = f"not tried: {SKIPPED[name]} | | |"
            elif name in records:
                cells = " | ".join(records[name][column] for column in COLUMNS)
            lines.append(f"| {ARCHITECTURES[name]} | {name} | {cells} |")
        _, end, after = rest.partition("\n<!-- end -->")
        table = "\n".join(["<!-- table: architectures -->", "", *lines, ""])
        Path(page).write_text(f"{before}{table}{end}{after}", encoding="utf-8")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES if os.environ.get("ARCHITECTURES") == "all" else USUAL))
def test_architecture(name, records, ragged_batch, with_random_gate, tmp_path):
    if name in SKIPPED:
        pytest.skip(SKIPPED[name])
    records[name] = {**checked(name, ragged_batch, with_random_gate, tmp_path), "several sequences": "yes"}
    if not os.environ.get("ARCHITECTURES_PAGE"):
        cells = [records[name][column] for column in COLUMNS]
        assert f"| {ARCHITECTURES[name]} | {name} | {' | '.join(cells)} |" in PAGE.read_text(encoding="utf-8"), (
            "run `make architectures`"
        )


def test_page():
    """The page has a row for every architecture that the installed transformers has, and no other."""
    assert re.findall(r"^\| [\w-]+ \| (\w+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE) == sorted(
        ARCHITECTURES
    )
    assert set(SKIPPED) | set(USUAL) | set(OVERRIDES) <= set(ARCHITECTURES)
