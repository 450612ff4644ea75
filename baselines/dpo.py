"""DPO: direct preference optimisation of the language model itself (Rafailov et al. 2023, arXiv 2305.18290), by TRL.

Its pairs come from a dataset or from the LM itself. For the latter, the reward that the other methods train on ranks
several samples of every prompt, and the best and the worst make a pair. This is the fair comparison: every method gets
the same information.
"""

import json
import math
import os
import time
from collections.abc import Callable
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
from baselines.policy import encode_prompts
from baselines.training import LoraModelConfig
from trl_proxy.devices import DeviceDefaults
from trl_proxy.files import write_text
from trl_proxy.loading import load_callable_reward
from trl_proxy.prompts import check_prompts, positions_of
from trl_proxy.reading import check_pairs
from trl_proxy.runs.arguments import RunArguments, load_policy, load_split, reward_names, to_device
from trl_proxy.runs.fit import fit, prepare_run
from trl_proxy.trainer.checkpoints import AtomicCheckpointMixin
from trl_proxy.trainer.config import RewardTimeoutConfig
from trl_proxy.trainer.prompt_checks import check_work
from trl_proxy.trainer.reward_guards import GuardedReward, RewardError

PAIRS_FILE = "pairs.json"


@dataclass
class DPOArguments(RewardTimeoutConfig, RunArguments):
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
    if given:
        dataset = check_pairs(dataset, where)
    lm, tokenizer = load_policy(model_args, training_args, training_args.device)
    # TRL cuts pairs that are too long by `max_length`.
    positions = None if given else positions_of(lm.config)
    check_prompts(
        dataset, where, lambda rows: encode_prompts(rows, tokenizer), positions, run_args.max_completion_length
    )
    pairs, seconds = (dataset, 0.0) if given else cached_pairs(lm, tokenizer, dataset, run_args, training_args)
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


class WeightedReward:
    """The weighted sum of several rewards; a reward that returns None does not apply."""

    __name__ = "weighted reward"

    def __init__(self, rewards: list[Callable], weights: list[float] | None, timeout: float | None):
        self.rewards = [GuardedReward(reward, reward.__name__, len(rewards) > 1, timeout) for reward in rewards]
        self.weights = weights or [1.0] * len(rewards)
        if len(self.weights) != len(rewards):
            raise ValueError(f"`reward_weights` has {len(self.weights)} weights for {len(rewards)} rewards.")

    def __call__(self, prompts: list, completions: list, **columns) -> list[float]:
        totals = [0.0] * len(prompts)
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            values = reward(prompts=prompts, completions=completions, **columns)
            if reward.error:
                raise RewardError(reward.error)
            totals = [total + weight * float(value or 0.0) for total, value in zip(totals, values, strict=True)]
        return totals


def cached_pairs(
    lm, tokenizer, prompts: Dataset, run_args: DPOArguments, training_args: DPOConfig
) -> tuple[Dataset, float]:
    """The pairs in the output folder, sampled first if needed, and the seconds that sampling them took."""
    state = PartialState()
    path = os.path.join(training_args.output_dir, PAIRS_FILE)
    made_with = {
        "dataset": "/".join(
            filter(None, (run_args.dataset_name, run_args.dataset_config, run_args.dataset_train_split))
        ),
        "rewards": [run_args.reward_model_name_or_path, run_args.reward_funcs, run_args.reward_weights],
        "samples_per_prompt": run_args.samples_per_prompt,
        "num_pair_prompts": run_args.num_pair_prompts,
        "max_completion_length": run_args.max_completion_length,
        "seed": training_args.seed,
        "num_processes": state.num_processes,
    }
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if found["made_with"] == made_with:
            return Dataset.from_list(found["pairs"]), found["seconds"]
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "ZeRO-3 has cut the LM into parts before pairs could be sampled from it: take "
            "scripts/accelerate_configs/fsdp2.yaml, or `--pairs dataset`."
        )
    started = time.monotonic()
    if run_args.num_pair_prompts:
        prompts = prompts.shuffle(seed=training_args.seed).select(range(min(run_args.num_pair_prompts, len(prompts))))
    rewards = [
        load_callable_reward(name, batch_size=run_args.sampling_batch_size, device=state.device)
        for name in reward_names(run_args)
    ]
    mine = prompts.shard(state.num_processes, state.process_index, contiguous=True)
    pairs = gather_object(
        sample_pairs(
            to_device(lm, state.device),
            tokenizer,
            mine,
            WeightedReward(rewards, run_args.reward_weights, run_args.reward_timeout),
            samples_per_prompt=run_args.samples_per_prompt,
            batch_size=run_args.sampling_batch_size,
            max_new_tokens=run_args.max_completion_length,
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
    reward: Callable,
    *,
    samples_per_prompt: int,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
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
