"""The arguments of the training scripts, and what they load: prompts, rewards, the LM."""

import dataclasses
import json
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from trl import ModelConfig, ScriptArguments, get_quantization_config

from ..devices import half_dtype
from ..loading import EMBEDDED, load_lm, load_prompts, load_reward


@dataclass
class RunArguments(ScriptArguments):
    """TRL's script arguments, the reward, and how long to train."""

    dataset_name: str | None = field(default=EMBEDDED, metadata={"help": "`embedded`, a JSON file or a hub dataset."})
    dataset_test_split: str = field(default="validation", metadata={"help": "Split for evaluation while training."})
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
        if self.max_train_seconds is not None and self.max_train_seconds <= 0:
            raise ValueError(f"`max_train_seconds` must be above 0, got {self.max_train_seconds}.")


def load_datasets(run_args: RunArguments, training_args) -> tuple[Dataset, Dataset | None]:
    """Prompts to train on, and to evaluate on if the training arguments ask for it."""
    name = run_args.dataset_name or EMBEDDED
    train = load_prompts(name, run_args.dataset_train_split)
    if training_args.eval_strategy == "no":
        return train, None
    return train, load_prompts(name, run_args.dataset_test_split)


def reward_names(run_args: RunArguments) -> list[str]:
    """The reward model's name and those of the reward functions; the embedded reward if there are none."""
    names = [run_args.reward_model_name_or_path] if run_args.reward_model_name_or_path else []
    return names + (run_args.reward_funcs or []) or [EMBEDDED]


def load_rewards(run_args: RunArguments) -> list:
    """The reward model and the reward functions, as TRL's trainers take them."""
    return [load_reward(name) for name in reward_names(run_args)]


def load_policy(model_args: ModelConfig, args, device: str | torch.device):
    """The LM that the model arguments name, in a dtype that suits the device, and its tokenizer. `args` tells whether
    to trust remote code."""
    # TRL's 4 bit computes in the dtype of the arguments and has no `auto`.
    auto = model_args.dtype == "auto"
    computed = dataclasses.replace(model_args, dtype=half_dtype(device)) if auto else model_args
    return load_lm(
        model_args.model_name_or_path or EMBEDDED,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(computed),
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
        device=device,
        attn_implementation=model_args.attn_implementation,
    )


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
