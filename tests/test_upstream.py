"""Canaries: what TRL and transformers do not promise and we override, call or read.

They move between minor versions, and then other tests fail in ways that are hard to read: after raising a pin, run
this file first."""

import inspect

import pytest
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer, RLOOTrainer
from trl.models import prepare_deepspeed
from trl.trainer import rloo_trainer
from trl.trainer.utils import RepeatSampler, get_callable_name, is_async_callable, pad, start_event_loop_in_daemon

from trl_proxy import PPOTrainer, ProxyPPOTrainer
from trl_proxy.decoding.prefix_cache import PreallocatedLayer
from trl_proxy.decoding.row_cache import _RowLayer
from trl_proxy.trainer.actor_critic import ActorCriticTrainer
from trl_proxy.trainer.checkpoints import AtomicCheckpointMixin
from trl_proxy.trainer.metrics import RowMetricsMixin
from trl_proxy.trainer.reward_guards import RewardGuardMixin

# The first parameters of each, which are all that we rely on.
TRAINER = {
    "_determine_best_metric": "metrics trial",
    "_push_from_checkpoint": "checkpoint_folder",
    "push_to_hub": "commit_message blocking token revision private",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "add_callback": "callback",
    "_compute_loss": "model inputs",
    "_prepare_inputs": "generation_batch",
    "_generate_and_score_completions": "inputs",
    "_generate_single_turn": "prompt_ids images multimodal_fields",
    "_get_output_dir": "trial",
    "_get_per_token_logps_and_entropies": "model input_ids attention_mask logits_to_keep batch_size compute_entropy",
    "_get_train_sampler": "dataset",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_rng_state": "checkpoint",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_save_rng_state": "output_dir",
    "create_model_card": "model_name dataset_name tags",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "evaluation_loop": "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    "get_eval_dataloader": "eval_dataset",
    "log": "logs start_time",
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
}
OTHERS = {
    Cache: {"__init__": "layers"},
    CacheLayerMixin: {
        "lazy_initialization": "key_states value_states",
        "update": "key_states value_states",
        "get_mask_sizes": "query_length",
        "get_seq_length": "",
        "get_max_length": "",
    },
    DynamicCache: {"batch_repeat_interleave": "repeats"},
    DynamicLayer: {"update": "key_states value_states", "lazy_initialization": "key_states value_states", "reset": ""},
    GRPOTrainer: {
        "_calculate_rewards": TRAINER["_calculate_rewards"],
        "_generate_and_score_completions": TRAINER["_generate_and_score_completions"],
        "evaluate": "eval_dataset ignore_keys metric_key_prefix",
        "evaluation_loop": TRAINER["evaluation_loop"],
        "get_eval_dataloader": TRAINER["get_eval_dataloader"],
        "log": TRAINER["log"],
    },
    GenerationMixin: {
        "generate": "inputs generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn synced_gpus "
        "assistant_model streamer negative_prompt_ids negative_prompt_attention_mask custom_generate",
        "init_continuous_batching": "generation_config",
        "_supports_default_dynamic_cache": "",
    },
    LogitsProcessor: {"__call__": "input_ids scores"},
    PreTrainedModel: {"save_pretrained": "save_directory is_main_process", "train": "mode"},
    StoppingCriteria: {"__call__": "input_ids scores"},
}


def parameters(function) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.name not in ("self", "cls") and p.kind not in kinds]


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [(owner, *item) for owner, methods in {RLOOTrainer: TRAINER, **OTHERS}.items() for item in methods.items()],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_is_overridden_has_the_same_signature(owner, name, expected):
    assert hasattr(owner, name), f"{owner.__name__} has no {name} any more: keep the pin, or fix what uses it"
    expected = expected.split()
    # A method of ours takes all that the trainer hands it; more optional parameters elsewhere do no harm.
    found = parameters(getattr(owner, name))
    found = found if owner is RLOOTrainer and name != "_get_per_token_logps_and_entropies" else found[: len(expected)]
    assert found == expected, f"{owner.__name__}.{name} now takes {found}: keep the pin, or fix what uses it"


@pytest.mark.parametrize(
    "ours", [AtomicCheckpointMixin, RowMetricsMixin, RewardGuardMixin, ActorCriticTrainer, ProxyPPOTrainer, PPOTrainer]
)
def test_every_override_of_the_trainer_is_watched(ours):
    overridden = {name for name, x in vars(ours).items() if inspect.isfunction(x) and hasattr(RLOOTrainer, name)}
    assert overridden - {"__init__"} <= TRAINER.keys()


@pytest.mark.parametrize(("ours", "theirs"), [(PreallocatedLayer, DynamicLayer), (_RowLayer, CacheLayerMixin)])
def test_every_override_of_the_cache_is_watched(ours, theirs):
    overridden = {name for name, x in vars(ours).items() if inspect.isfunction(x) and hasattr(theirs, name)}
    assert overridden - {"__init__"} <= OTHERS[theirs].keys()
    # What transformers leaves to a layer is ours to give.
    assert not getattr(ours, "__abstractmethods__", None)


@pytest.mark.parametrize(
    "what",
    [
        "self._tokenizer =",
        "self._step = 0",
        "self._step += 1",
        "generate_every = self.args.steps_per_generation * self.num_iterations",
        "self._metrics =",
        "self.eos_token_ids =",
        "self.reward_func_names",
        "self._logs = {",
        '"advantages": deque',
        "self._pending_extra_logs =",
        "self._pending_metrics =",
        "self.reward_weights =",
        "self.reward_func_names =",
        "def _log_completion_extra(",
        "def _log_metric(",
        'key not in ["prompt", "completion", "completion_ids"]',
        'reward_kwargs["trainer_state"] =',
        'reward_kwargs["log_extra"] =',
        'reward_kwargs["log_metric"] =',
        'text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False',
        "apply_chat_template(x, reward_processing_class, **self.chat_template_kwargs)",
        "self.epsilon_low =",
        "self.num_generations_eval =",
        "self.max_completion_length =",
        '"frac_reward_zero_std"',
        '"completion_mask"',
    ],
)
def test_what_is_read_of_the_trainer_is_still_there(what):
    assert what in inspect.getsource(rloo_trainer), f"RLOOTrainer has no `{what}` any more: fix what reads it"


def test_functions_that_are_no_api():
    assert parameters(pad)[:3] == ["tensors", "padding_value", "padding_side"]
    assert {"output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"} <= set(
        parameters(rotate_checkpoints)
    )
    assert is_async_callable(test_functions_that_are_no_api) is False
    assert get_callable_name(pad) == "pad"
    assert parameters(prepare_deepspeed)[:2] == ["model", "accelerator"]
    assert parameters(start_event_loop_in_daemon) == ["name"]
    # `EpochSampler` reads these and stands in for the class itself.
    sampler = RepeatSampler([1, 2], mini_repeat_count=1, shuffle=True, seed=3)
    assert (sampler.shuffle, sampler.seed) == (True, 3)
    assert sampler.generator.initial_seed() == 3
