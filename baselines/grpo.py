"""GRPO: group relative policy optimisation of the LM itself (Shao et al. 2024, arXiv 2402.03300), by TRL."""

from trl import GRPOConfig, GRPOTrainer

from baselines.training import LoraModelConfig, train_on_reward
from trl_proxy.checkpoints import AtomicCheckpoints
from trl_proxy.runs import RunArguments

CONFIGS = (RunArguments, GRPOConfig, LoraModelConfig)


class AtomicGRPOTrainer(AtomicCheckpoints, GRPOTrainer):
    """[`~trl.GRPOTrainer`] with checkpoints in one step."""


def train(run_args: RunArguments, training_args: GRPOConfig, model_args: LoraModelConfig) -> GRPOTrainer:
    """See [`train_on_reward`]."""
    return train_on_reward("grpo", AtomicGRPOTrainer, run_args, training_args, model_args)
