"""Train a proxy over a frozen language model by PPO on a reward.

On a bare machine (embedded LM, reward and prompts, 2 CPU cores):

    accelerate launch scripts/train_proxy.py --config scripts/recipes/smollm2_cpu.yaml

On a GPU, with any causal LM, dataset and reward model of the hub:

    accelerate launch scripts/train_proxy.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --load_in_4bit \\
        --dataset_name trl-lib/ultrafeedback-prompt \\
        --reward_model_name_or_path Skywork/Skywork-Reward-V2-Qwen3-0.6B \\
        --output_dir outputs/proxy

The same command again goes on where an interrupted run stopped. `--proxy_name_or_path` trains a proxy further, on
longer responses or another reward, say. `--reward_funcs package.module.function` adds reward functions of your own,
weighted by `--reward_weights`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

import copy
import dataclasses
from dataclasses import dataclass, field

from trl import ModelConfig

from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.config import FILLED_IN
from trl_proxy.guards import RewardError
from trl_proxy.parsing import ScriptParser
from trl_proxy.runs import (
    RunArguments,
    begin,
    fit,
    load_datasets,
    load_policy,
    load_rewards,
    run_script,
)

# ProxyConfig on the command line: `--temperature` is the training arguments' already, and the model fills in the rest.
ProxyArguments = dataclasses.make_dataclass(
    "ProxyArguments",
    [
        (f.name, f.type, copy.copy(f))
        for f in dataclasses.fields(ProxyConfig)
        if f.name not in ("temperature", *FILLED_IN)
    ],
)


@dataclass
class ProxyRunArguments(RunArguments):
    """What the baselines' runs do not have."""

    proxy_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A trained proxy to train further, folder or hub id. Its configuration (`features`, `p_t`, ...) "
            "takes the place of the flags of a new one."
        },
    )


def make_parser() -> ScriptParser:
    """TRL's parser over everything that can be set."""
    return ScriptParser(
        {"the proxy": ProxyArguments, "the run": ProxyRunArguments, "PPO": ProxyPPOConfig, "the LM": ModelConfig},
        order=(ProxyRunArguments, ProxyPPOConfig, ProxyArguments, ModelConfig),
        description=__doc__.partition("\n")[0],
    )


def main(
    run_args: ProxyRunArguments, training_args: ProxyPPOConfig, proxy_args, model_args: ModelConfig
) -> ProxyPPOTrainer:
    """Loads everything, trains, saves the proxy to `output_dir`."""
    trained = run_args.proxy_name_or_path
    if trained:
        proxy_config = ProxyConfig.from_pretrained(trained)
    else:
        proxy_config = ProxyConfig(**dataclasses.asdict(proxy_args), temperature=training_args.temperature)
    run, checkpoint = begin("proxy", run_args, training_args, model_args, proxy_config)
    train_dataset, eval_dataset = load_datasets(run_args, training_args)
    rewards = load_rewards(run_args)
    lm, tokenizer = load_policy(model_args, training_args, training_args.device)
    model = ProxyModelForCausalLM.from_pretrained(lm, trained) if trained else ProxyModelForCausalLM(lm, proxy_config)
    trainer = ProxyPPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    if trainer.accelerator.is_main_process:
        model.print_trainable_parameters()
    fit(trainer, run, run_args, checkpoint)
    return trainer


if __name__ == "__main__":
    run_script(
        "train_proxy",
        lambda: main(*make_parser().parse_args_and_config()),
        errors=(RewardError,),
        goes_on=True,
    )
