"""The main job: trains a proxy over a frozen LM by PPO, from flags or a recipe."""

import dataclasses
from dataclasses import dataclass, field

from ..core.config import ProxyConfig
from ..modeling.causal_lm import ProxyModelForCausalLM
from ..trainer.config import ProxyPPOConfig
from ..trainer.proxy_ppo import ProxyPPOTrainer
from .arguments import FrozenModelConfig, RunArguments, load_datasets, load_policy, load_rewards
from .fit import fit, prepare_run
from .parsing import ScriptParser


@dataclass
class ProxyArguments(ProxyConfig):
    """[`ProxyConfig`] on the command line, without the fields that the model fills in. `--temperature` is PPO's."""

    temperature: float = field(default=1.0, init=False)
    hidden_size: int | None = field(default=None, init=False)
    embedding_size: int | None = field(default=None, init=False)
    base_model_name_or_path: str | None = field(default=None, init=False)
    base_model_sha256: str | None = field(default=None, init=False)
    decoding: dict | None = field(default=None, init=False)


@dataclass
class ProxyRunArguments(RunArguments):
    """Run arguments that only a proxy has."""

    proxy_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A trained proxy to train further, folder or hub id. Its configuration (`features`, `p_t`, ...) "
            "replaces the flags for a new one."
        },
    )


def make_parser() -> ScriptParser:
    """TRL's parser over everything that can be set."""
    return ScriptParser(
        {
            "the proxy": ProxyArguments,
            "the run": ProxyRunArguments,
            "PPO": ProxyPPOConfig,
            "the LM": FrozenModelConfig,
        },
        order=(ProxyRunArguments, ProxyPPOConfig, ProxyArguments, FrozenModelConfig),
        description="Train a proxy over a frozen language model by PPO on a reward.",
    )


def train(
    run_args: ProxyRunArguments, training_args: ProxyPPOConfig, proxy_args, model_args: FrozenModelConfig
) -> ProxyPPOTrainer:
    """Loads everything, trains, saves the proxy to `output_dir`."""
    trained = run_args.proxy_name_or_path
    if trained:
        proxy_config = ProxyConfig.from_pretrained(trained)
    else:
        proxy_config = ProxyConfig(**dataclasses.asdict(proxy_args) | {"temperature": training_args.temperature})
    run, checkpoint = prepare_run("proxy", run_args, training_args, model_args, proxy_config)
    train_dataset, eval_dataset = load_datasets(run_args, training_args)
    rewards = load_rewards(run_args, training_args.reward_weights, training_args.trust_remote_code)
    lm, tokenizer = load_policy(model_args, training_args, training_args.device)
    model = ProxyModelForCausalLM.from_pretrained(lm, trained) if trained else ProxyModelForCausalLM(lm, proxy_config)
    model.proxy.config.decoding = {"system_prompt": run_args.system_prompt}
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
