"""What the trained baselines share: LoRA by default, one way to train on a reward, and the policy that comes out."""

import importlib
import json
import os
from dataclasses import dataclass, field

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import ModelConfig, get_peft_config

from baselines.sft import GreedyPolicy
from trl_proxy.decoding.hidden_states import HiddenStateHook, execution_device
from trl_proxy.files import loading_model
from trl_proxy.runs import train
from trl_proxy.runs.arguments import RunArguments, load_datasets, load_policy, load_rewards
from trl_proxy.runs.fit import fit, prepare_run
from trl_proxy.runs.parsing import ScriptParser
from trl_proxy.trainer.fields import TRAINED_LM, check_fields

BASELINES = ("ppo", "rloo", "grpo", "dpo")  # modules of this package with `CONFIGS` and `train`


def method_of(name: str) -> str:
    """The method that a name means: `rlhf` is the former name of `ppo`."""
    return "ppo" if name == "rlhf" else name


@dataclass
class LoraModelConfig(ModelConfig):
    """TRL's model arguments, with LoRA on every linear layer unless it is switched off."""

    use_peft: bool = field(default=True, metadata={"help": "Train LoRA adapters; `false` trains all weights."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )

    def __post_init__(self):
        check_fields(self, TRAINED_LM)
        super().__post_init__()


def make_parser(method: str) -> ScriptParser:
    """The parser of a training script: `proxy` is scripts/train_proxy.py, the others are scripts/train_baseline.py."""
    if method == "proxy":
        return train.make_parser()
    module = importlib.import_module(f"baselines.{method}")
    sections = dict(zip(("the run", method.upper(), "the LM"), module.CONFIGS, strict=True))
    return ScriptParser(sections, description=f"{method}: {' '.join(module.__doc__.split())}")


def train_on_reward(method: str, trainer_class, run_args: RunArguments, training_args, model_args: LoraModelConfig):
    """Trains an LM by one of TRL's online trainers, on the same prompts and rewards as the proxy.

    Returns:
        the trainer; its `model` is trained, and saved in the output folder.
    """
    run, checkpoint = prepare_run(method, run_args, training_args, model_args)
    train_dataset, eval_dataset = load_datasets(run_args, training_args)
    rewards = load_rewards(run_args, training_args.reward_weights, training_args.trust_remote_code)
    lm, tokenizer = load_policy(model_args, training_args, training_args.device)
    trainer = trainer_class(
        model=lm,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    # The head gets a contiguous tensor: for the slice that TRL's trainers ask for, torch on a CPU copies its weights
    # once per row of the batch.
    with HiddenStateHook(lm, layers=()):
        fit(trainer, run, run_args, checkpoint)
    return trainer


class TunedPolicy(GreedyPolicy):
    """Greedy decoding of a trained LM.

    Attributes:
        frozen: the LM as it was before training, to judge how likely responses are.
    """

    def __init__(self, model, lm, tokenizer, **kwargs):
        super().__init__(model, tokenizer, **kwargs)
        self.frozen = WithoutAdapter(model, lm) if isinstance(model, PeftModel) else lm

    def parameters_report(self) -> dict[str, int]:
        """Numbers of parameters that were trained, and of all."""
        total = self.model.num_parameters()
        is_adapter = isinstance(self.model, PeftModel)
        trained = sum(p.numel() for name, p in self.model.named_parameters() if not is_adapter or "lora_" in name)
        return {"trainable_parameters": trained, "total_parameters": total}

    def close(self) -> None:
        """Takes an adapter off the LM again."""
        if isinstance(self.model, PeftModel):
            self.model.unload()


class WithoutAdapter:
    """The LM under an adapter: called like the LM, as if the adapter were not there."""

    def __init__(self, model: PeftModel, lm):
        self.model, self.config, self.lm = model, lm.config, lm

    def get_base_model(self):
        return self.lm

    def __call__(self, **inputs):
        with self.model.disable_adapter():
            return self.model(**inputs)


def load_trained(folder: str | os.PathLike, lm, tokenizer, **kwargs) -> TunedPolicy:
    """The policy that a baseline's output folder holds, decoded greedily: a LoRA adapter is put on `lm`, and a whole
    model is loaded next to it. `kwargs` are those of [`~baselines.sft.GreedyPolicy`].

    Raises:
        ValueError: if there is no model in the folder, or it was made for another LM.
    """
    folder = os.fspath(folder)
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        with loading_model(folder, "adapter"):
            base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        if base != lm.config._name_or_path:
            raise ValueError(f"{folder} holds an adapter of {base}, not of {lm.config._name_or_path}.")
        with loading_model(folder, "adapter"):
            model = PeftModel.from_pretrained(lm, folder)
    elif os.path.isfile(os.path.join(folder, "config.json")):
        with loading_model(folder), open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            architectures = json.load(file).get("architectures")
        if architectures != lm.config.architectures:
            raise ValueError(f"{folder} holds a {architectures}, not a {lm.config.architectures}.")
        with loading_model(folder):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=lm.dtype)
        model.to(execution_device(lm))
    else:
        raise ValueError(f"{folder} holds no trained model: neither adapter_config.json nor config.json is there.")
    return TunedPolicy(model.eval(), lm, tokenizer, **kwargs)
