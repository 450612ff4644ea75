"""What becomes of every setting that TRL's configurations bring along.

A field is used, refused, or without effect, and nothing is passed over in silence. The configurations check themselves
by these tables, and docs/fields.md is printed from them. A test walks TRL's dataclasses, so a field of a new TRL is
missed at once.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

from transformers.utils import logging

from ..devices import is_main_process

logger = logging.get_logger(__name__)
Status = Literal["used", "refused", "no effect"]


class Field(NamedTuple):
    """What becomes of a field.

    Attributes:
        status: `used`; `refused`, an error if it is set away from its default; or `no effect`, a warning then.
        why: the reason, and what to do instead: the rest of a sentence.
        same: other values that mean what the default means.
        needs: a field without which this one has no effect.
    """

    status: Status = "used"
    why: str = ""
    same: tuple = ()
    needs: str = ""


def _fields(
    status: Literal["used", "refused", "no effect"], why: str, names: str, same: tuple = ()
) -> dict[str, Field]:
    return dict.fromkeys(names.split(), Field(status, why, same))


def _used(names: str, needs: str = "") -> dict[str, Field]:
    return dict.fromkeys(names.split(), Field(needs=needs))


# Of PPOConfig, for PPOTrainer.
PPO = {
    # transformers' Trainer
    **_used(
        "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type "
        "lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon "
        "optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32 "
        "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
        "gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel "
        "use_cache neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps logging_first_step "
        "log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project "
        "trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay "
        "per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps save_on_each_node "
        "save_total_limit push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
        "hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip "
        "restore_callback_states_from_checkpoint full_determinism seed use_cpu accelerator_config parallelism_config "
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns "
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
        "fsdp fsdp_config deepspeed debug skip_memory_metrics resume_from_checkpoint local_rank"
    ),
    **_used("liger_kernel_config", needs="use_liger_kernel"),
    # TRL's RLOOTrainer
    **_used(
        "model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout num_generations "
        "num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of "
        "generation_batch_size steps_per_generation temperature top_p top_k min_p generation_kwargs "
        "chat_template_kwargs repetition_penalty cache_implementation beta num_iterations epsilon epsilon_high "
        "reward_weights normalize_advantages reward_clip_range mask_truncated_completions sync_ref_model "
        "log_completions"
    ),
    **_used("ref_model_mixup_alpha ref_model_sync_steps", needs="sync_ref_model"),
    **_used("num_completions_to_print log_unique_prompts", needs="log_completions"),
    # this project's
    **_used(
        "reward_timeout gamma gae_lambda vf_coef cliprange_value entropy_coef group_baseline missing_eos_penalty "
        "reward_shaping_tokens"
    ),
    **_fields("refused", "PPO's loss has no labels; leave it out", "label_smoothing_factor"),
    **_fields(
        "refused",
        "a rollout must hold whole groups of generations; lower `per_device_train_batch_size` instead",
        "auto_find_batch_size",
    ),
    **_fields(
        "refused",
        "evaluation keeps no predictions; write a reward function of weight 0 for a further metric",
        "include_for_metrics",
    ),
    **_fields(
        "refused",
        "a run cannot resume exactly from the middle of a rollout; on SIGTERM, scripts/train_proxy.py saves a "
        "checkpoint at its end",
        "enable_jit_checkpoint",
    ),
    **_fields("refused", "prompts are drawn by `seed`; set that", "data_seed"),
    **_fields(
        "refused",
        "prompts are drawn for groups of generations; `shuffle_dataset=False` takes them in their order",
        "train_sampling_strategy",
    ),
    **_fields(
        "refused",
        "rollouts are made by `generate`, which keeps the record that PPO needs; set it to False",
        "use_vllm use_transformers_continuous_batching use_transformers_paged",
    ),
    **_fields(
        "refused",
        "it sets up vLLM, and rollouts are made by `generate`; leave it out",
        "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url "
        "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization "
        "vllm_max_model_length vllm_tensor_parallel_size",
    ),
    **_fields(
        "refused",
        "it sets up continuous batching, and rollouts are made by `generate`; leave it out",
        "transformers_continuous_batching_config",
    ),
    **_fields(
        "no effect",
        "evaluation scores responses and keeps no predictions",
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "batch_eval_metrics label_names",
    ),
    **_fields(
        "no effect", "the log counts tokens always, as `num_tokens`", "include_num_input_tokens_seen", same=(False,)
    ),
    **_fields("no effect", "prompts are not drawn by their length", "length_column_name"),
    **_fields("no effect", "the loss is a mean over the steps of all devices anyway", "average_tokens_across_devices"),
    **_fields(
        "no effect", "`train()` trains, and `eval_strategy` says when to evaluate", "do_train do_eval do_predict"
    ),
    **_fields("no effect", "there are no images, because the LM's processor is a tokenizer", "log_multimodal"),
}

_NO_LM = "no LM runs in the update; set it to False"
_SHARDED = (
    "it would shard the frozen LM; use scripts/accelerate_configs/multi_gpu.yaml, and --load_in_4bit if the LM is too "
    "large for one GPU"
)
_CANDIDATES = "the gate's candidates take its place; set `p_t` and `max_candidates` of ProxyConfig"
# Of ProxyPPOConfig, for ProxyPPOTrainer.
PROXY = {
    **PPO,
    **_used("lm_logp_coef replay_rollouts rollout_batch_size offload_rollouts"),
    **_fields("refused", _NO_LM, "activation_checkpointing gradient_checkpointing", same=(False, None)),
    **_fields(
        "refused",
        "no LM runs in the update; leave it out",
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs liger_kernel_config neftune_noise_alpha",
    ),
    **_fields("refused", "no LM runs in the update; load the LM with `use_kernels=True` instead", "use_liger_kernel"),
    **_fields(
        "refused", "the gate has no router, and the LM's is frozen; leave it out", "router_aux_loss_coef", same=(0.0,)
    ),
    **_fields(
        "refused",
        "it would cast the gate and the frozen LM; choose the LM's dtype when it is loaded",
        "bf16_full_eval fp16_full_eval",
    ),
    **_fields("refused", _SHARDED, "fsdp fsdp_config parallelism_config", same=("", False)),
    **_fields("refused", _CANDIDATES, "top_p"),
    **_fields("refused", _CANDIDATES, "top_k", same=(None,)),
    **_fields("refused", _CANDIDATES, "min_p", same=(0.0,)),
    **_fields(
        "refused", "rollouts are padded to their longest prompt", "pad_to_multiple_of", same=(None, "none", "null")
    ),
    **_fields(
        "refused",
        "the frozen LM is the reference; leave it out",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    ),
    **_fields(
        "no effect", "the gate computes in float32, and the LM in its own dtype", "bf16 fp16", same=(None, False)
    ),
    **_fields("no effect", "a rollout always has a cache", "use_cache"),
    **_fields("no effect", "neither the gate nor the frozen LM has dropout", "disable_dropout"),
    **_fields("no effect", "ZeRO-3 is refused", "ds3_gather_for_generation"),
}

# Of TRL's ModelConfig, for a frozen LM.
FROZEN_LM = {
    **_used("model_name_or_path model_revision dtype attn_implementation load_in_8bit load_in_4bit"),
    **_used("bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage", needs="load_in_4bit"),
    **_fields(
        "refused",
        "the LM is frozen; scripts/train_baseline.py trains adapters",
        "use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
        "lora_task_type use_rslora use_dora",
    ),
}
# The same, for an LM that is trained.
TRAINED_LM = {
    **FROZEN_LM,
    **_used("use_peft"),
    **_used(
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
        "lora_task_type use_rslora use_dora",
        needs="use_peft",
    ),
}
# Of TRL's ScriptArguments.
SCRIPT = {
    **_used("dataset_name dataset_config dataset_train_split dataset_test_split"),
    **_fields(
        "refused",
        "every prompt is checked before training; leave it out, and take a part of a large dataset by "
        "--dataset_train_split 'train[:10000]'",
        "dataset_streaming",
    ),
    **_fields(
        "refused",
        "the LM's buffers are not broadcast when a proxy is trained; leave it out, or set `ddp_broadcast_buffers` to "
        "False for a baseline",
        "ignore_bias_buffers",
    ),
}
# Arguments of trainers that a ProxyPPOTrainer cannot have: the rest of a sentence.
ARGUMENTS = {
    "peft_config": "the LM is frozen; train its adapters with PPOTrainer",
    "quantization_config": "the LM is loaded already; give it to `from_pretrained`",
    "compute_metrics": "evaluation keeps no predictions; write a reward function of weight 0 for a further metric",
    "tokenizer": "give it as `processing_class`",
    "tools": "a response is one turn",
    "environment_factory": "a response is one turn",
    "rollout_func": "rollouts are made by the gate",
    "ref_model": "the frozen LM is the reference",
    "reward_model": "give it in `reward_funcs`",
    "data_collator": "prompts are not collated",
}


def _is_default(value: Any, field: dataclasses.Field, entry: Field) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value in (default, *entry.same)


def check_fields(config, table: dict[str, Field]) -> None:
    """`ValueError` for a refused field that is set away from its default; a warning for one without effect. Fields
    that are not in the table are not looked at."""
    for field in dataclasses.fields(config):
        entry = table.get(field.name)
        if entry is None or _is_default(value := getattr(config, field.name), field, entry):
            continue
        if entry.status == "refused":
            raise ValueError(f"`{field.name}={value!r}` is not supported: {entry.why}.")
        why = entry.why
        if entry.needs and not getattr(config, entry.needs):
            why = f"`{entry.needs}` is off"
        if (entry.status == "no effect" or entry.needs) and why and is_main_process():
            logger.warning_once(f"`{field.name}={value!r}` has no effect: {why}.")
