"""The arguments of the training scripts, and what they load: prompts, rewards, the LM."""

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers.utils import logging
from trl import ModelConfig, ScriptArguments, get_quantization_config

from ..core.values import check_values
from ..decoding.settings import DecodingSettings, check_generation_kwargs, with_system_prompt
from ..devices import half_dtype, is_main_process
from ..loading import EMBEDDED, load_lm, load_prompts, load_reward
from ..reading import UnknownSplit
from ..rewards.checks import check_weights
from ..trainer.fields import FROZEN_LM, SCRIPT, check_fields
from ..trainer.prompt_checks import check_work

logger = logging.get_logger(__name__)


@dataclass
class SystemPromptArguments:
    """A system message for conversations that have none."""

    system_prompt: str | None = field(
        default=None, metadata={"help": "A system message, put before every conversation that has none."}
    )


@dataclass
class DecodingArguments(SystemPromptArguments):
    """How an LM is decoded, for scripts without a configuration of TRL's that has it."""

    generation_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Options of `generate` that replace the LM's generation_config.json, as JSON."},
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."}
    )

    def __post_init__(self):
        if hasattr(super(), "__post_init__"):
            super().__post_init__()  # type: ignore[misc]  # of the arguments after this mixin
        for name in ("generation_kwargs", "chat_template_kwargs"):
            if getattr(self, name) is not None:
                parse_dicts(self, name)
        check_generation_kwargs(self.generation_kwargs)  # type: ignore[arg-type]  # parsed just now

    def decoding_of(self, lm, tokenizer, max_new_tokens: int) -> DecodingSettings:
        """The decoding settings of an LM with these arguments."""
        return DecodingSettings.of(
            lm,
            tokenizer,
            max_new_tokens=max_new_tokens,
            generation_kwargs=self.generation_kwargs,  # type: ignore[arg-type]
            chat_template_kwargs=self.chat_template_kwargs,  # type: ignore[arg-type]
            system_prompt=self.system_prompt,
        )


@dataclass
class RunArguments(SystemPromptArguments, ScriptArguments):
    """TRL's script arguments, the reward, and how long to train."""

    dataset_name: str | None = field(
        default=EMBEDDED,
        metadata={
            "help": "`embedded`, a file (.json, .jsonl, .csv, .parquet, also .gz), a folder of such files, or a "
            "dataset of the hub."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a dataset of the hub, or of a folder that has some."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on, or a part of one: `train[:90%%]`."}
    )
    dataset_test_split: str = field(
        default="validation", metadata={"help": "Split for evaluation while training, or a part: `train[90%%:]`."}
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "`embedded`, `embedded:harmless`, `embedded:helpful`, or a model id. Default: `embedded`."},
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Dotted import paths of reward functions, besides the reward model."}
    )
    max_train_seconds: float | None = field(
        default=None,
        metadata={"help": "End training after this many seconds at the latest, validation included."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train from the start in a folder that holds another run's checkpoints."}
    )
    verbose: bool = field(
        default=False,
        metadata={"help": "Print everything that is logged, and a progress bar. `log.jsonl` always has everything."},
    )
    # What the command line and its recipe set: `RecipeParser.asked`.
    asked: dict | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        check_fields(self, SCRIPT)
        check_values(self)


def load_split(run_args: RunArguments, split: str) -> Dataset:
    """A split of the prompts that the arguments name, with their system message."""
    prompts = load_prompts(run_args.dataset_name or EMBEDDED, split, config=run_args.dataset_config)
    return add_system_prompt(prompts, run_args.system_prompt)


@dataclass
class FrozenModelConfig(ModelConfig):
    """TRL's model arguments for an LM that is not trained: adapters are refused."""

    def __post_init__(self):
        check_fields(self, FROZEN_LM)
        super().__post_init__()


def load_datasets(run_args: RunArguments, training_args) -> tuple[Dataset, Dataset | None]:
    """Prompts to train on, and to evaluate on if the training arguments ask for it. A warning counts those that are in
    both."""
    train = load_split(run_args, run_args.dataset_train_split)
    check_work(training_args, train)
    strategy = getattr(training_args.eval_strategy, "value", training_args.eval_strategy)
    if strategy == "no":
        return train, None
    try:
        test = load_split(run_args, run_args.dataset_test_split)
    except UnknownSplit as error:
        raise ValueError(
            f"--eval_strategy {strategy} has no prompts to evaluate on ({str(error)[:-1]}): as in "
            "--dataset_train_split 'train[:90%]' --dataset_test_split 'train[90%:]', or without evaluation by "
            "--eval_strategy no."
        ) from None
    both = set(map(str, train["prompt"][:])) & set(map(str, test["prompt"][:]))
    if both and is_main_process():
        logger.warning(
            f"{len(both)} prompts of the evaluation ({run_args.dataset_test_split}) are trained on too "
            f"({run_args.dataset_train_split}): `eval_reward` says less about new prompts."
        )
    return train, test


def add_system_prompt(dataset: Dataset, system_prompt: str | None) -> Dataset:
    """The dataset with the system message before every prompt that has none."""
    if not system_prompt:
        return dataset
    return dataset.map(lambda row: {"prompt": with_system_prompt(row["prompt"], system_prompt)})


def reward_names(run_args: RunArguments) -> list[str]:
    """The reward model's name and those of the reward functions; the embedded reward if there are none."""
    names = [run_args.reward_model_name_or_path] if run_args.reward_model_name_or_path else []
    functions = run_args.reward_funcs or []
    return names + ([functions] if isinstance(functions, str) else functions) or [EMBEDDED]


def load_rewards(
    run_args: RunArguments,
    weights: list[float] | None,
    trust_remote_code: bool,
    device: str | torch.device = "cpu",
) -> list[Callable]:
    """The reward model and the reward functions, as TRL's trainers take them; `ValueError` if one cannot be loaded, or
    there is not one weight for each. A trainer moves reward models to its device."""
    names = reward_names(run_args)
    check_weights(weights, names)
    return [load_reward(name, device=device, trust_remote_code=trust_remote_code) for name in names]


# What `model_init_kwargs` must not set, because a flag of the scripts does.
_FLAGS = {
    "attn_implementation": "--attn_implementation",
    "dtype": "--dtype",
    "quantization_config": "--load_in_4bit or --load_in_8bit",
    "revision": "--model_revision",
    "torch_dtype": "--dtype",
    "trust_remote_code": "--trust_remote_code",
}


def load_policy(model_args: ModelConfig, args, device: str | torch.device):
    """The LM that the model arguments name, in a dtype that suits the device, and its tokenizer. `args` tells whether
    to trust remote code, and may have TRL's `model_init_kwargs` for `from_pretrained`."""
    name, further = model_args.model_name_or_path or EMBEDDED, getattr(args, "model_init_kwargs", None) or {}
    if clash := sorted(further.keys() & _FLAGS.keys()):
        raise ValueError(f"`model_init_kwargs` must not set `{clash[0]}`: use {_FLAGS[clash[0]]}.")
    # TRL's 4 bit computes in the dtype of the arguments and has no `auto`.
    computed = model_args
    if model_args.dtype == "auto":
        computed = copy.copy(model_args)
        computed.dtype = half_dtype(device)
    try:
        return load_lm(
            name,
            dtype=model_args.dtype,
            quantization_config=get_quantization_config(computed),
            revision=model_args.model_revision,
            trust_remote_code=args.trust_remote_code,
            device=device,
            attn_implementation=model_args.attn_implementation,
            **further,
        )
    except ValueError as error:
        if not further or not isinstance(error.__cause__, TypeError):
            raise
        raise ValueError(f"`model_init_kwargs` {further} do not suit the LM {name} ({error.__cause__}).") from error


def to_device(lm, device):
    """The LM on that device; quantized weights stay on the device that they were loaded to."""
    return lm if getattr(lm, "is_quantized", False) else lm.to(device)


def to_cli(values: dict) -> list[str]:
    """Settings (names and values as in a recipe) as the words of a command line."""
    words = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def parse_dicts(args, *names: str) -> None:
    """
    Turns fields of `args` into dicts: they are dicts in a recipe and JSON on the command line, as transformers' own
    are. None becomes an empty dict.

    Raises:
        ValueError: the text of a flag is not a JSON object.
    """
    for name in names:
        value = getattr(args, name)
        with suppress(ValueError):
            value = json.loads(value) if isinstance(value, str) else value or {}
        if not isinstance(value, dict):
            raise ValueError(f"--{name} must be a JSON object, such as '{{\"seed\": 1}}', got {value}.")
        setattr(args, name, value)
