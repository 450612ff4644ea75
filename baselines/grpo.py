"""GRPO: group relative policy optimisation of the LM itself (Shao et al. 2024, arXiv 2402.03300), by TRL."""

from dataclasses import dataclass

from trl import GRPOConfig, GRPOTrainer

from baselines.training import LoraModelConfig, train_on_reward
from trl_proxy.devices import DeviceDefaults
from trl_proxy.runs.arguments import RunArguments
from trl_proxy.trainer.config import RewardTimeoutConfig
from trl_proxy.trainer.decoding import DecodingMixin
from trl_proxy.trainer.prompt_checks import PromptCheckMixin
from trl_proxy.trainer.reward_guards import RewardGuardMixin


@dataclass
class GuardedGRPOConfig(RewardTimeoutConfig, DeviceDefaults, GRPOConfig):
    """[`~trl.GRPOConfig`] with a limit on the reward functions' time, and this machine's defaults."""


CONFIGS = (RunArguments, GuardedGRPOConfig, LoraModelConfig)


class GuardedGRPOTrainer(PromptCheckMixin, DecodingMixin, RewardGuardMixin, GRPOTrainer):
    """[`~trl.GRPOTrainer`] by the project's decoding settings, with atomic checkpoints, one of them when a reward
    fails."""


def train(run_args: RunArguments, training_args: GuardedGRPOConfig, model_args: LoraModelConfig) -> GRPOTrainer:
    """See [`train_on_reward`]."""
    return train_on_reward("grpo", GuardedGRPOTrainer, run_args, training_args, model_args)
