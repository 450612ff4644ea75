"""DPO: direct preference optimisation of the language model itself (Rafailov et al. 2023, arXiv 2305.18290), by TRL.

Its pairs come from a dataset or from the LM itself. For the latter, the reward that the other methods train on ranks
several samples of every prompt, and the best and the worst make a pair. This is the fair comparison: every method gets
the same information.
"""

import json
import math
import os
import re
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, DPOTrainer, get_peft_config, is_conversational

from baselines.best_of_n import BestOfNPolicy
from baselines.training import LoraModelConfig
from trl_proxy.decoding.settings import DecodingSettings
from trl_proxy.devices import DeviceDefaults
from trl_proxy.files import write_text
from trl_proxy.prompts import check_prompts
from trl_proxy.reading import check_pairs
from trl_proxy.rewards.caller import RewardCaller
from trl_proxy.runs.arguments import DecodingArguments, RunArguments, load_policy, load_rewards, load_split, to_device
from trl_proxy.runs.fit import fit, prepare_run
from trl_proxy.runs.resume import DECODING, PAIRS_FILE, differences, read_json
from trl_proxy.trainer.checkpoints import AtomicCheckpointMixin
from trl_proxy.trainer.config import RewardTimeoutConfig
from trl_proxy.trainer.prompt_checks import check_work

# Settings of a run that cannot change its pairs: the rest of them may, and count.
_AFTER_SAMPLING = re.compile(
    r"asked|versions|max_steps|num_train_epochs|max_train_seconds|learning_rate|lr_scheduler_.*|warmup_.*|weight_decay|"
    r"beta|load_best_model_at_end|push_to_hub|(adam|eval|hub|logging|save)_.*"
)


@dataclass
class DPOArguments(RewardTimeoutConfig, DecodingArguments, RunArguments):
    """The source of DPO's preference pairs."""

    pairs: Literal["sampled", "dataset"] = field(
        default="sampled",
        metadata={"help": "`sampled`: samples of the LM, ranked by the reward. `dataset`: prompt, chosen, rejected."},
    )
    num_pair_prompts: int | None = field(default=None, metadata={"help": "Prompts that are sampled; all by default."})
    samples_per_prompt: int = field(default=4, metadata={"help": "Samples of each, of which two make a pair."})
    max_completion_length: int = field(default=64, metadata={"help": "Longest sample, in tokens."})
    sampling_batch_size: int = field(default=64, metadata={"help": "Prompts that are sampled at once."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Of the rewards; 1 by default."})

    def __post_init__(self):
        super().__post_init__()
        if self.samples_per_prompt < 2:
            raise ValueError(f"`samples_per_prompt` must be at least 2, got {self.samples_per_prompt}.")


@dataclass
class DeviceDPOConfig(DeviceDefaults, DPOConfig):
    """[`~trl.DPOConfig`] with this machine's defaults."""


CONFIGS = (DPOArguments, DeviceDPOConfig, LoraModelConfig)


class AtomicDPOTrainer(AtomicCheckpointMixin, DPOTrainer):
    """[`~trl.DPOTrainer`] with atomic checkpoints."""


def train(run_args: DPOArguments, training_args: DPOConfig, model_args: LoraModelConfig) -> DPOTrainer:
    """Makes or reads the pairs, then trains; the time for the pairs counts as training.

    Returns:
        the trainer; its `model` is trained, and saved in the output folder.
    """
    run, checkpoint = prepare_run("dpo", run_args, training_args, model_args)
    check_work(training_args)
    where = f"{run_args.dataset_name} ({run_args.dataset_train_split})"
    dataset = load_split(run_args, run_args.dataset_train_split)
    given = run_args.pairs == "dataset"
    dataset = check_pairs(dataset, where) if given else dataset
    reward = None if given else _load_reward(run_args, training_args)
    lm, tokenizer = load_policy(model_args, training_args, training_args.device)
    decoding = run_args.decoding_of(lm, tokenizer, run_args.max_completion_length)
    # TRL cuts pairs that are too long by `max_length`.
    positions = None if given else decoding.max_positions
    check_prompts(dataset, where, decoding.encode, positions, run_args.max_completion_length)
    pairs, seconds = dataset, 0.0
    if reward is not None:
        pairs, seconds = cached_pairs(lm, decoding, dataset, reward, run, run_args, training_args)
    if run_args.chat_template_kwargs:  # TRL takes them from a column
        pairs = pairs.add_column("chat_template_kwargs", [run_args.chat_template_kwargs] * len(pairs))
    set_seed(training_args.seed)  # the adapter's first weights are the same whether pairs were sampled just now or not
    trainer = AtomicDPOTrainer(
        model=lm,
        args=training_args,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    fit(trainer, run, run_args, checkpoint, seconds_before=seconds)
    return trainer


def _load_reward(run_args: DPOArguments, training_args: DPOConfig) -> RewardCaller:
    """The weighted sum of the rewards. It is loaded before the LM: a wrong name fails early."""
    weights, trusted = run_args.reward_weights, training_args.trust_remote_code
    rewards = load_rewards(run_args, weights, trusted, training_args.device)
    template, timeout = run_args.chat_template_kwargs, run_args.reward_timeout
    return RewardCaller(rewards, weights=weights, timeout=timeout, chat_template_kwargs=template)


def cached_pairs(
    lm,
    decoding: DecodingSettings,
    prompts: Dataset,
    reward: RewardCaller,
    run: dict,
    run_args: DPOArguments,
    training_args: DPOConfig,
) -> tuple[Dataset, float]:
    """The pairs in the output folder, and the seconds that sampling them took. They are sampled first if there are
    none, or those that are there belong to another run."""
    state = PartialState()
    path = os.path.join(training_args.output_dir, PAIRS_FILE)
    settings = {name: value for name, value in run.items() if not _AFTER_SAMPLING.fullmatch(name)}
    made_with = json.loads(json.dumps({**settings, DECODING: decoding.as_dict()}, default=str))
    if os.path.isfile(path):
        found = read_json(path)
        before = found.get("made_with", {})
        if not differences(before, made_with) and before.get(DECODING) == made_with[DECODING]:
            return Dataset.from_list(found["pairs"]), found["seconds"]
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "ZeRO-3 has cut the LM into parts before pairs could be sampled from it: take "
            "scripts/accelerate_configs/fsdp2.yaml, or `--pairs dataset`."
        )
    started = time.monotonic()
    if run_args.num_pair_prompts:
        prompts = prompts.shuffle(seed=training_args.seed).select(range(min(run_args.num_pair_prompts, len(prompts))))
    reward.check(prompts.column_names, prompts["prompt"][0])
    mine = prompts.shard(state.num_processes, state.process_index, contiguous=True)
    pairs = gather_object(
        sample_pairs(
            to_device(lm, state.device),
            decoding.tokenizer,
            mine,
            reward,
            samples_per_prompt=run_args.samples_per_prompt,
            batch_size=run_args.sampling_batch_size,
            decoding=decoding,
            seed=training_args.seed + 1000 * state.process_index,
        )
    )
    if not pairs:
        raise ValueError("The reward prefers none of the samples to another: there are no pairs to train on.")
    seconds = time.monotonic() - started
    if state.is_main_process:
        write_text(path, json.dumps({"made_with": made_with, "seconds": seconds, "pairs": pairs}, indent=1))
    state.wait_for_everyone()
    return Dataset.from_list(pairs), seconds


@torch.inference_mode()
def sample_pairs(
    lm,
    tokenizer,
    prompts: Dataset,
    reward: RewardCaller,
    *,
    samples_per_prompt: int,
    batch_size: int,
    seed: int,
    max_new_tokens: int | None = None,
    decoding: DecodingSettings | None = None,
) -> list[dict]:
    """The best of several samples of each prompt against the worst; no pair if the reward prefers none, or both are
    the same text."""
    columns = {name: prompts[name][:] for name in prompts.column_names if name != "prompt"}
    conversations = prompts["prompt"][:]
    policy = BestOfNPolicy(
        lm,
        tokenizer,
        reward,
        n=samples_per_prompt,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        decoding=decoding,
        seed=seed,
    )
    samples = policy.sample(conversations, **columns)
    conversational = is_conversational({"prompt": conversations[0]})
    pairs = []
    for i, prompt in enumerate(conversations):
        scored = sorted(((rewards[i], texts[i]) for rewards, texts in zip(samples.rewards, samples.texts)))
        (low, worst), (high, best) = scored[0], scored[-1]
        if best != worst and not math.isclose(low, high):
            if conversational:
                best, worst = ([{"role": "assistant", "content": text}] for text in (best, worst))
            pairs.append({"prompt": prompt, "chosen": best, "rejected": worst})
    return pairs
