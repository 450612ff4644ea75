"""Loads a language model, a reward or prompts by name.

The name `embedded` stands for the embedded defaults, which need no GPU and no model hub. All other names are looked up
on the hub or on the disk, as usual.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .devices import best_device, half_dtype, has_bfloat16, warn_of_emulation
from .embedded.lm import embedded_lm_path
from .embedded.prompts import DATA, embedded_prompts
from .files import loading_model
from .prompts import check_dataset
from .reading import read_dataset, select_split, with_prompts
from .rewards.checks import TRL_REWARDS, import_reward
from .rewards.classifier import ClassifierReward
from .rewards.preference import PreferenceReward

logger = logging.get_logger(__name__)
EMBEDDED = "embedded"


def resolve_model(name: str, revision: str | None = None) -> str:
    """The name of a model for `from_pretrained`; `embedded` becomes the embedded LM's folder. `ValueError` for a
    revision of what has none."""
    where = "embedded LM" if name == EMBEDDED else f"folder {name}" if os.path.isdir(name) else None
    if where and revision not in (None, "main"):
        raise ValueError(f"The {where} has no revision {revision}: leave out --model_revision.")
    return str(embedded_lm_path()) if name == EMBEDDED else name


def load_lm(
    name: str = EMBEDDED,
    dtype: str | torch.dtype | None = None,
    quantization_config=None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    **kwargs,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer, padding on the left.

    Args:
        name: `embedded`, a folder or a hub id.
        dtype: as for `from_pretrained`. By default, and by `auto`, the one the weights are stored in. On a device
            without bfloat16 it is float32 (a CPU) or float16 (an accelerator).
        quantization_config, revision, trust_remote_code, kwargs: as for `from_pretrained`.
        device: the device that the LM will run on; by default the accelerator if there is one. Quantized weights are
            loaded there, others are not moved.

    Raises:
        `ValueError`: there is no such LM, one of its files cannot be read, a folder is given with a revision, or the
            tokenizer has no end-of-sequence token.
    """
    path = resolve_model(name, revision)
    shared = {"revision": revision, "trust_remote_code": trust_remote_code} if path == name else {}
    with loading_model(path):
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **shared)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {name} has no end-of-sequence token: set `eos_token` in its files.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    target = torch.device(device) if device else best_device()
    if dtype in (None, "auto"):
        dtype = "auto" if has_bfloat16(target) else half_dtype(target)
        if dtype == "float16" and quantization_config is None:
            logger.warning_once(f"This {target.type} device has no bfloat16: the LM runs in float16.")
    else:
        warn_of_emulation(dtype, target)
    if quantization_config is not None:  # bitsandbytes would take any accelerator that it finds
        kwargs.setdefault("device_map", {"": "cpu" if target.type == "cpu" else str(target)})
    with loading_model(path):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, quantization_config=quantization_config, **shared, **kwargs
        )
    model.config._name_or_path = model.name_or_path = name  # PEFT writes the latter into an adapter
    return model.eval(), tokenizer


def load_prompts(
    name: str = EMBEDDED, split: str = "train", revision: str | None = None, config: str | None = None
) -> Dataset:
    """Prompts as TRL's trainers take them; every row is checked.

    Args:
        name: `embedded`, or a dataset as for [`~trl_proxy.reading.read_dataset`]: a file, a folder or a hub id.
            `embedded` has a conversational `prompt` and its `kind` (`everyday` or `harm_adjacent`). If preference data
            have no `prompt` (as `Anthropic/hh-rlhf`), it is what both responses begin with.
        split: splits and slices, as in `datasets`: `train[:90%]`. `embedded` has train, validation and test, and one
            per kind, such as train_everyday. `train+train_everyday` has the everyday prompts twice.
        revision, config: of a dataset of the hub; a folder may have configurations too.

    Raises:
        `ValueError`: no such dataset, configuration or split, no rows, no `prompt` column, or a row that is no prompt.
    """
    if name == EMBEDDED:
        if config:
            raise ValueError(f"The embedded prompts have no configurations: leave --dataset_config {config} out.")
        return select_split(embedded_prompts(), split, name)
    where = f"{name} ({split})"
    dataset = with_prompts(read_dataset(name, split, config, revision), where)
    check_dataset(dataset, where)
    return dataset


def load_reward(
    name: str = EMBEDDED,
    *,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Callable:
    """A reward as a function, as TRL's trainers and [`~trl_proxy.rewards.RewardCaller`] take it.

    Args:
        name: `embedded` (balanced), `embedded:harmless`, `embedded:helpful`, `embedded:gold` (for
            evaluation only), a dotted import path of a reward function, the name of one of TRL's, or a reward model: a
            folder or a hub id of a sequence classifier with one label.
        batch_size, device, trust_remote_code: of a reward model.

    Raises:
        `ValueError`: there is no such reward, or a model is no reward model.
    """
    if name == EMBEDDED or name.startswith(EMBEDDED + ":"):
        return PreferenceReward.from_pretrained(DATA / "reward", side=name.partition(":")[2] or "balanced")
    is_path = "." in name or name in TRL_REWARDS
    if is_path and "/" not in name and not Path(name).exists():
        return import_reward(name)
    return ClassifierReward.from_pretrained(
        name, batch_size=batch_size, device=device, trust_remote_code=trust_remote_code
    )
