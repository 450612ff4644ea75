"""Settings of PPO on the gate, [`ProxyPPOConfig`], and on the LM itself, [`PPOConfig`]."""

from dataclasses import dataclass, field

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler
from trl import RLOOConfig

from ..core.values import check_values
from ..decoding.settings import check_generation_kwargs
from ..devices import DeviceDefaults
from . import fields


def check_by_trying(args: TrainingArguments) -> None:
    """`ValueError` for a schedule of the learning rate, or a way to compile, that cannot be made."""
    schedule, options = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    given = f"`lr_scheduler_type={schedule.value}` with `lr_scheduler_kwargs={options}`"
    try:
        if options and schedule in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
            raise ValueError("it takes none")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        get_scheduler(schedule, optimizer, 0, num_training_steps=10**6, scheduler_specific_kwargs=options)
        if args.torch_compile:
            backend, mode = args.torch_compile_backend, args.torch_compile_mode
            given = f"`torch_compile_backend={backend}` with `torch_compile_mode={mode}`"
            torch.compile(torch.nn.Identity(), backend=backend, mode=mode)
    except (ArithmeticError, AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{given} cannot be used ({' '.join(str(error).split())}): correct them.") from error


@dataclass
class RewardTimeoutConfig:
    """A time limit for the reward functions of any training."""

    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "If a reward function takes longer than this many seconds for a batch, the run ends with a "
            "checkpoint. The limit stops Python code and network waits, but no computation inside a library."
        },
    )

    def __post_init__(self):
        check_values(self)
        super().__post_init__()  # type: ignore[misc]  # the arguments after this mixin have it


@dataclass
class PPOConfig(RewardTimeoutConfig, DeviceDefaults, RLOOConfig):
    """PPO with a critic on top of TRL's [`~trl.RLOOConfig`]: `num_iterations` are PPO's epochs over a rollout,
    `steps_per_generation` its minibatches, `epsilon` its clip range."""

    _samples_the_lm = True  # else a gate chooses among the LM's candidates

    num_generations: int | None = field(
        default=4,
        metadata={
            "help": "Completions per prompt. It must divide the number of responses of a rollout (all processes). "
            "1 is allowed, because the critic is a baseline too."
        },
    )
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs over each rollout."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    vf_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far a value may move from the rollout's."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    normalize_advantages: bool = field(
        default=True, metadata={"help": "Whiten the advantages of each rollout: mean 0, deviation 1 over its steps."}
    )
    group_baseline: bool = field(
        default=True,
        metadata={
            "help": "With several generations per prompt, subtract the mean reward of the prompt's other responses. "
            "The critic then need not learn which prompts are easy."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Subtracted from the score of a response that was cut off before its EOS token."},
    )
    reward_shaping_tokens: int | None = field(
        default=None,
        metadata={
            "help": "In training, also score a response after every this many tokens, and reward each change of the "
            "score at once. The sum stays the finished response's reward. Costs reward calls, saves episodes."
        },
    )

    _fields = fields.PPO

    def __post_init__(self):
        fields.check_fields(self, self._fields)
        for name in ("max_completion_length", "num_generations"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` must be a number, got None: a rollout needs one.")
        try:
            super().__post_init__()
        except ValueError as error:
            # RLOO needs two generations for its leave-one-out baseline, and that check is the parent's last statement.
            if not (self.num_generations == 1 and "at least 2 generations" in str(error)):
                raise
        minibatches = self.steps_per_generation * self.num_iterations
        if minibatches % self.gradient_accumulation_steps:
            raise ValueError(
                f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps}, which does not divide the "
                f"{minibatches} minibatches of a rollout (`steps_per_generation` x `num_iterations`): choose a "
                "divisor, because an update learns from whole minibatches of one rollout."
            )
        if self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            # Every update uses all trained parameters. DDP's search would miss the critic, which runs after `forward`.
            self.ddp_find_unused_parameters = False
        check_generation_kwargs(self.generation_kwargs, sampling=self._samples_the_lm)


@dataclass
class ProxyPPOConfig(PPOConfig):
    """PPO on the gate alone. Defaults suit any reward and are the best we measured: see docs/method.md."""

    _samples_the_lm = False

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate of AdamW on the gate."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Must stay False: the update runs only the gate."}
    )
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL penalty to the frozen LM, per decision; needs no second LM."}
    )
    lm_logp_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the frozen LM's log-probability of a token, paid to the decision that lets it through. "
            "It keeps responses plausible. Unlike `beta`, it does not push the gate towards indecision."
        },
    )
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Completions per prompt in evaluation. Decoding is greedy, so 1 is enough."}
    )
    replay_rollouts: int = field(
        default=4,
        metadata={
            "help": "Number of latest rollouts that an update learns from. Minibatches hold this many times more "
            "responses and need more memory. The LM does not run again."
        },
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Responses decoded at once on each device; default: the whole rollout."}
    )
    offload_rollouts: bool = field(
        default=False,
        metadata={
            "help": "Keep the hidden states of rollouts, their largest part, in the host's memory. The device gets "
            "them one minibatch at a time."
        },
    )

    _fields = fields.PROXY
