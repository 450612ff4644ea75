"""RLHF: PPO on the language model itself (Ouyang et al. 2022, arXiv 2203.02155), LoRA by default."""

from baselines.training import LoraModelConfig, train_on_reward
from trl_proxy import PPOConfig, PPOTrainer
from trl_proxy.runs.arguments import RunArguments

CONFIGS = (RunArguments, PPOConfig, LoraModelConfig)


def train(run_args: RunArguments, training_args: PPOConfig, model_args: LoraModelConfig) -> PPOTrainer:
    """See [`train_on_reward`]."""
    return train_on_reward("ppo", PPOTrainer, run_args, training_args, model_args)
