"""RLOO: REINFORCE with a leave-one-out baseline on the language model itself (Ahmadian et al. 2024, arXiv 2402.14740),
by TRL."""

from dataclasses import dataclass

from trl import RLOOConfig, RLOOTrainer

from baselines.training import LoraModelConfig, train_on_reward
from trl_proxy.devices import DeviceDefaults
from trl_proxy.runs.arguments import RunArguments
from trl_proxy.trainer.config import RewardTimeoutConfig
from trl_proxy.trainer.decoding import DecodingMixin
from trl_proxy.trainer.prompt_checks import PromptCheckMixin
from trl_proxy.trainer.reward_guards import RewardGuardMixin


@dataclass
class GuardedRLOOConfig(RewardTimeoutConfig, DeviceDefaults, RLOOConfig):
    """[`~trl.RLOOConfig`] with a limit on the reward functions' time, and this machine's defaults."""


CONFIGS = (RunArguments, GuardedRLOOConfig, LoraModelConfig)


class GuardedRLOOTrainer(PromptCheckMixin, DecodingMixin, RewardGuardMixin, RLOOTrainer):
    """[`~trl.RLOOTrainer`] by the project's decoding settings, with atomic checkpoints, one of them when a reward
    fails."""


def train(run_args: RunArguments, training_args: GuardedRLOOConfig, model_args: LoraModelConfig) -> RLOOTrainer:
    """See [`train_on_reward`]."""
    return train_on_reward("rloo", GuardedRLOOTrainer, run_args, training_args, model_args)
