"""RLOO: REINFORCE with a leave-one-out baseline on the language model itself (Ahmadian et al. 2024, arXiv 2402.14740),
by TRL."""

from trl import RLOOConfig, RLOOTrainer

from baselines.training import LoraModelConfig, train_on_reward
from trl_proxy.checkpoints import AtomicCheckpoints
from trl_proxy.runs import RunArguments

CONFIGS = (RunArguments, RLOOConfig, LoraModelConfig)


class AtomicRLOOTrainer(AtomicCheckpoints, RLOOTrainer):
    """[`~trl.RLOOTrainer`] with checkpoints in one step."""


def train(run_args: RunArguments, training_args: RLOOConfig, model_args: LoraModelConfig) -> RLOOTrainer:
    """See [`train_on_reward`]."""
    return train_on_reward("rloo", AtomicRLOOTrainer, run_args, training_args, model_args)
