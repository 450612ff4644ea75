"""Every architecture of causal LM that transformers has, tiny and random: a gate on it decodes as the LM itself does."""

import inspect
import os

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Small values of the fields that configurations commonly have. A field that a configuration lacks is left out.
SIZES = {
    "vocab_size": 96,
    "decoder_vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "type_vocab_size": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
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
    "DbrxForCausalLM": {"ffn_config": {"moe_top_k": 2, "ffn_hidden_size": 32}, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
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
        "hidden_dropout_prob": 0.0,
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
    sizes |= {name: value for name, value in {"is_decoder": True}.items() if settable(name)}
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
    return model_class(config_class(**small(config_class(**DEFAULTS.get(class_name, {})), class_name))).eval()
# What the default configuration of these needs before it can be made.
DEFAULTS: dict[str, dict] = {}


NEW = 6  # tokens
ACCEPT_ALL = {"max_candidates": 8, "p_t": 1e-4}


def closed_form_row(model, ids):
    """Greedy decisions of one text `(1, n)`, without padding or a cache, read off the distribution of `forward`."""
    for _ in range(NEW):
        output = model(input_ids=ids, use_cache=False, output_lm_logits=True, logits_to_keep=0)
        pi, lm_logits = output.logits[0, -1].exp(), output["lm_logits"][0, -1]
        order = [i for i in lm_logits.argsort(descending=True).tolist() if pi[i] > 0] 
        left = 1.0
        for token in order:
            if token == order[-1] or pi[token] / left >= 0.5:
                break
            left = left - pi[token]
        ids = torch.cat([ids, ids.new_tensor([[token]])], 1)
        if token == 2: break
    return ids
