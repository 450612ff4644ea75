"""Configurations: what a proxy is ([`ProxyConfig`]) and how it, or the LM itself, is trained by PPO."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from typing import Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from trl import RLOOConfig

from .devices import DeviceDefaults
from .files import write_text

CONFIG_NAME = "proxy_config.json"
WEIGHTS_NAME = "proxy_model.safetensors"
# Fields of [`ProxyConfig`] that the model fills in.
FILLED_IN = ("hidden_size", "embedding_size", "base_model_name_or_path", "base_model_sha256")


@dataclass
class ProxyConfig:
    """What the LM proposes, what the gate reads and how large the gate is.

    The defaults are ours where the paper gives no value: they are the ones that measured best. `pooled_features`, with
    which a gate learns better still, is off since continuous batching cannot follow it: see docs/method.md.
    """

    p_t: float = field(
        default=0.05,
        metadata={"help": "Smallest probability a candidate may have (the paper sweeps 0.1, 0.01, 0.001, 0.0001)."},
    )
    p_t_mode: Literal["relative", "absolute"] = field(
        default="relative",
        metadata={"help": "`relative`: p_t counts from the most probable token, as min-p does. `absolute`: as it is."},
    )
    max_candidates: int = field(default=16, metadata={"help": "Most candidates offered at one position."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the LM's proposals."})
    proposal: Literal["ranked", "sampled"] = field(
        default="ranked",
        metadata={"help": "`ranked`: in descending probability. `sampled`: drawn without replacement."},
    )
    features: Literal["prefix", "candidate"] = field(
        default="prefix",
        metadata={
            "help": "`prefix`: hidden state before the candidate and the candidate's embedding, one LM forward per "
            "token. `candidate`: hidden state at the candidate (the paper's), one LM forward per proposal."
        },
    )
    feature_layers: list[int] = field(
        default_factory=lambda: [-1],
        metadata={
            "help": "Which of the LM's hidden states the gate reads, as transformers counts them: 0 the embeddings, k "
            "the output of layer k, -1 the last one, which is made to predict the next token."
        },
    )
    pooled_features: bool = field(
        default=False,
        metadata={
            "help": "The gate also reads the mean of the hidden states so far: what the whole conversation is about."
        },
    )
    gate_hidden_sizes: list[int] = field(
        default_factory=lambda: [256], metadata={"help": "Widths of the gate's hidden layers; the critic's too."}
    )
    initial_accept_bias: float = field(
        default=1.0, metadata={"help": "Accept logit of a new gate, at least 0: it accepts everything when greedy."}
    )
    threshold: float = field(
        default=0.0, metadata={"help": "A greedy decision accepts a logit from here on; larger aligns harder."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Hidden size of the LM; filled in by the model."})
    embedding_size: int | None = field(default=None, metadata={"help": "Embedding size; filled in by the model."})
    base_model_name_or_path: str | None = field(default=None, metadata={"help": "The LM; filled in by the model."})
    base_model_sha256: str | None = field(
        default=None, metadata={"help": "Checksum of the LM, see `modeling.lm_sha256`; filled in by the model."}
    )

    def __post_init__(self):
        """Raises `ValueError` naming the field, its value and what is allowed."""
        if not 0.0 < self.p_t <= 1.0:
            raise ValueError(f"`p_t` must be in (0, 1], got {self.p_t}.")
        if not self.temperature > 0.0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}.")
        if not isinstance(self.max_candidates, int) or self.max_candidates < 1:
            raise ValueError(f"`max_candidates` must be an integer of at least 1, got {self.max_candidates}.")
        if not math.isfinite(self.threshold):
            raise ValueError(f"`threshold` must be a finite number, got {self.threshold}.")
        if self.initial_accept_bias < 0.0:
            raise ValueError(f"`initial_accept_bias` must be at least 0, got {self.initial_accept_bias}.")
        if not self.gate_hidden_sizes or min(self.gate_hidden_sizes) < 1:
            raise ValueError(f"`gate_hidden_sizes` must be positive integers, got {self.gate_hidden_sizes}.")
        if not self.feature_layers or len(set(self.feature_layers)) < len(self.feature_layers):
            raise ValueError(f"`feature_layers` must be one or more layers, none twice, got {self.feature_layers}.")
        for name, allowed in (
            ("p_t_mode", ("relative", "absolute")),
            ("proposal", ("ranked", "sampled")),
            ("features", ("prefix", "candidate")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `proxy_config.json`."""
        write_text(os.path.join(save_directory, CONFIG_NAME), json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder_or_id: str | os.PathLike, **hub_kwargs) -> "ProxyConfig":
        """Reads `proxy_config.json` from a folder or a hub repository; raises `ValueError` where there is none."""
        try:
            with open(proxy_file(folder_or_id, CONFIG_NAME, **hub_kwargs), encoding="utf-8") as file:
                values = json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{CONFIG_NAME} of {folder_or_id} is no JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{CONFIG_NAME} of {folder_or_id} must be a JSON object, got {type(values).__name__}.")
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"{CONFIG_NAME} of {folder_or_id} has unknown keys: {', '.join(sorted(unknown))}.")
        return cls(**values)


def proxy_file(folder_or_id: str | os.PathLike, name: str, **hub_kwargs) -> str:
    """Path of a proxy's file in a local folder, or downloaded from the hub; `ValueError` where there is no proxy."""
    folder_or_id = os.fspath(folder_or_id)
    if os.path.isdir(folder_or_id):
        path = os.path.join(folder_or_id, name)
        if not os.path.isfile(path):
            raise ValueError(f"{folder_or_id} holds no proxy: {name} is missing.")
        return path
    try:
        return hf_hub_download(folder_or_id, name, **hub_kwargs)
    except (RemoteEntryNotFoundError, HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"{folder_or_id} is neither a folder nor a hub repository that holds a proxy ({name})."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{folder_or_id} is no folder here, and the hub could not be reached for {name}: check the path, or the "
            "network."
        ) from error
    except OSError as error:  # a full disk, a rate limit
        raise ValueError(f"{name} of {folder_or_id} could not be had from the hub ({error}).") from error


@dataclass
class RewardTimeout:
    """The limit that every training's reward functions can have."""

    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds after which a call of a reward function, one for a whole batch, ends the run with a "
            "checkpoint. It reaches Python code and waiting for a network, not a computation inside a library."
        },
    )

    def __post_init__(self):
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise ValueError(f"`reward_timeout` must be above 0, got {self.reward_timeout}.")
        super().__post_init__()  # type: ignore[misc]  # of the arguments that it stands before


@dataclass
class PPOConfig(RewardTimeout, DeviceDefaults, RLOOConfig):
    """PPO with a critic on top of TRL's [`~trl.RLOOConfig`]: `num_iterations` are PPO's epochs over a rollout,
    `steps_per_generation` its minibatches, `epsilon` its clip range."""

    num_generations: int | None = field(
        default=1, metadata={"help": "Completions per prompt; 1 is allowed, since the critic is the baseline."}
    )
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs over each rollout."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    vf_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far a value may move from the rollout's."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    group_baseline: bool = field(
        default=True,
        metadata={
            "help": "With several generations per prompt, count a response's reward from the mean of the prompt's "
            "other responses: the critic need not learn which prompts are easy."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Taken off the score of a response that was cut off before its end-of-sequence token."},
    )
    reward_shaping_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Score a response in training also after every so many tokens, and pay each change of the score "
            "where it arises; the sum stays the finished response's reward. Costs reward calls, saves episodes."
        },
    )

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            # RLOO needs two generations for its leave-one-out baseline, and that check is the parent's last statement.
            if not (self.num_generations == 1 and "at least 2 generations" in str(error)):
                raise
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if self.reward_shaping_tokens is not None and self.reward_shaping_tokens < 1:
            raise ValueError(f"`reward_shaping_tokens` must be at least 1, got {self.reward_shaping_tokens}.")
        if self.missing_eos_penalty is not None and self.missing_eos_penalty <= 0:
            raise ValueError(f"`missing_eos_penalty` must be above 0, got {self.missing_eos_penalty}.")
        if self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            # Every update uses all that is trained; DDP's search would miss the critic, which runs after `forward`.
            self.ddp_find_unused_parameters = False
        if self.use_vllm:
            raise ValueError("`use_vllm=True` is not supported: rollouts are made by `generate`; set it to False.")
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "`use_transformers_continuous_batching=True` is not supported: rollouts need the record of decisions "
                "that `generate` keeps; set it to False."
            )
        if (self.generation_kwargs or {}).get("num_beams", 1) > 1:
            raise ValueError("`num_beams` above 1 is not supported: a rollout samples; remove it.")


@dataclass
class ProxyPPOConfig(PPOConfig):
    """PPO on the gate alone. The defaults are plain PPO for any reward, with the rate that learnt best. What learns
    better at a price, or with some rewards only, is off here and on in the recipes: see docs/method.md."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate of AdamW on the gate."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Must stay False: the update runs the gate alone."}
    )
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL penalty to the frozen LM, per decision; needs no second LM."}
    )
    lm_logp_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the frozen LM's log-probability of a token, paid to the decision that lets it through: "
            "responses stay what the LM finds plausible. Unlike `beta` it does not ask the gate to be undecided."
        },
    )
    replay_rollouts: int = field(
        default=1,
        metadata={
            "help": "Rollouts that an update learns from, the newest and those before it: minibatches hold so many "
            "times more responses, at the price of their memory, and no LM runs for them."
        },
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Responses decoded at once on each device; all of a rollout's if not set."}
    )
    offload_rollouts: bool = field(
        default=False,
        metadata={
            "help": "Keep the hidden states of rollouts, their largest part, in the host's memory; the device gets "
            "those of a minibatch for its update."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.gradient_checkpointing:
            raise ValueError("`gradient_checkpointing=True` is not supported: no LM runs in the update; set it False.")
        if self.replay_rollouts < 1:
            raise ValueError(f"`replay_rollouts` must be at least 1, got {self.replay_rollouts}.")
        if self.sync_ref_model:
            raise ValueError("`sync_ref_model=True` is not supported: the frozen LM is the reference; set it False.")
