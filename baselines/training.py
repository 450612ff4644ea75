"""What the trained baselines share: LoRA by default, one way to train on a reward, and the policy that comes out."""

import json
import os
from dataclasses import dataclass, field

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, set_seed
from trl import ModelConfig, get_peft_config

from baselines.sft import SFTPolicy
from trl_proxy.runs import (
    RunArguments,
    checkpoint_to_resume,
    fit,
    identity,
    load_datasets,
    load_policy,
    load_rewards,
)


@dataclass
class LoraModelConfig(ModelConfig):
    """TRL's model arguments, with LoRA on every linear layer unless it is switched off."""

    use_peft: bool = field(default=True, metadata={"help": "Train LoRA adapters; `false` trains all weights."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )


def train_on_reward(trainer_class, run_args: RunArguments, training_args, model_args: LoraModelConfig):
    """Trains an LM by one of TRL's online trainers, on the same prompts and rewards as the proxy.

    Returns:
        the trainer; its `model` is trained, and saved in the output folder.
    """
    run = identity(run_args, training_args, model_args)
    checkpoint = checkpoint_to_resume(training_args.output_dir, run, run_args.overwrite_output_dir)
    train_dataset, eval_dataset = load_datasets(run_args, training_args)
    rewards = load_rewards(run_args)
    set_seed(training_args.seed)
    lm, tokenizer = load_policy(model_args, training_args)
    trainer = trainer_class(
        model=lm,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    fit(trainer, run, run_args, checkpoint)
    return trainer


def load_trained(folder: str | os.PathLike, lm, tokenizer, *, batch_size: int, max_new_tokens: int) -> SFTPolicy:
    """The policy that a baseline's output folder holds, decoded greedily: a LoRA adapter is put on `lm`, and a whole
    model is loaded beside it.

    Raises:
        ValueError: if there is no model in the folder, or it was made for another LM.
    """
    folder = os.fspath(folder)
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        if base != lm.config._name_or_path:
            raise ValueError(f"{folder} holds an adapter of {base}, not of {lm.config._name_or_path}.")
        model = PeftModel.from_pretrained(lm, folder)
    elif os.path.isfile(os.path.join(folder, "config.json")):
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            architectures = json.load(file).get("architectures")
        if architectures != lm.config.architectures:
            raise ValueError(f"{folder} holds a {architectures}, not a {lm.config.architectures}.")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=lm.dtype)
        model.to(lm.device)
    else:
        raise ValueError(f"{folder} holds no trained model: neither adapter_config.json nor config.json is there.")
    return SFTPolicy(model.eval(), tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens)
