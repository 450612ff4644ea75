"""Reward models: sequence classifiers with one label, of the hub or the disk, as reward functions."""

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file, logging
from trl import apply_chat_template, is_conversational

from ..files import loading_model
from ..prompts import check_chat_template, length_buckets
from .checks import RewardError, name_prompt

logger = logging.get_logger(__name__)


class ClassifierReward:
    """A reward model as TRL's trainers use it: the logit of a sequence classifier with one label, for the prompt and
    the response in one text. Conversations are rendered by the chat template of its own tokenizer.

    Called as any reward function of TRL, `(prompts, completions, **columns) -> list[float]`. A text that is longer
    than the model's limit loses its beginning.

    Args:
        model: the classifier.
        tokenizer: its tokenizer; by default that of the model's name.
        name: by default the last part of the model's name, as in TRL's logs.
        batch_size: texts per forward.

    Raises:
        ValueError: the model has several labels, or no tokenizer that can pad.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        batch_size: int = 32,
    ):
        config = getattr(model, "config", None)
        if config is None:
            raise ValueError(
                f"A reward that is a module must be a sequence classifier of transformers, got {type(model).__name__}."
            )
        source = name or config._name_or_path or type(model).__name__
        self.__name__ = source.rstrip("/").split("/")[-1]
        _check_labels(source, getattr(model, "num_labels", 1))
        self.tokenizer = load_tokenizer_of(source) if tokenizer is None else tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token_id is None:
            raise ValueError(f"The tokenizer of the reward model {source} has no padding token: set its `pad_token`.")
        # The score is read at the last token that is not padding.
        config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model = model.eval()
        self.max_length = _max_length(model, self.tokenizer)
        self.batch_size = batch_size
        self.chat_template_kwargs: dict = {}

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        **kwargs,
    ) -> "ClassifierReward":
        """
        Loads a reward model by its name.

        Args:
            name: a hub id, or a folder. It may hold an adapter of PEFT.
            kwargs: as for `from_pretrained` of the model.

        Raises:
            ValueError: there is no such model, or it is no classifier with one label.
        """
        model = _load_classifier(name, {"trust_remote_code": trust_remote_code, **kwargs})
        tokenizer = tokenizer or load_tokenizer_of(name, kwargs.get("revision"), trust_remote_code)
        reward = cls(model, tokenizer, name=name, batch_size=batch_size)
        reward.to(device)
        return reward

    def to(self, device: str | torch.device) -> None:
        """Moves the model, unless its loading has placed it."""
        if not getattr(self.model, "is_quantized", False) and getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)

    def check_prompt(self, prompt: str | list[dict]) -> None:
        """`ValueError` if the prompt is a conversation and the tokenizer has no chat template."""
        check_chat_template(prompt, self.tokenizer)

    def texts(self, prompts: list, completions: list) -> list[str]:
        """The texts that the model reads."""
        if not is_conversational({"prompt": prompts[0]}):
            return [p + c for p, c in zip(prompts, completions, strict=True)]
        messages = [{"messages": p + c} for p, c in zip(prompts, completions, strict=True)]
        return [apply_chat_template(x, self.tokenizer, **self.chat_template_kwargs)["text"] for x in messages]

    @torch.inference_mode()
    def __call__(self, prompts: list, completions: list, **columns) -> list[float]:
        encoded = self.tokenizer(text=self.texts(prompts, completions), add_special_tokens=False, verbose=False)
        rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        lengths = [len(row["input_ids"]) for row in rows]
        if 0 in lengths:
            prompt = name_prompt(prompts[lengths.index(0)])
            raise RewardError(f"The reward model {self.__name__} has nothing to read for the prompt {prompt}.")
        if self.max_length is not None and max(lengths) > self.max_length:
            logger.warning_once(
                f"Texts longer than the {self.max_length} tokens of the reward model {self.__name__} lose their "
                "beginning."
            )
            rows = [{name: values[-self.max_length :] for name, values in row.items()} for row in rows]
        device = next(self.model.parameters()).device
        scores = [0.0] * len(rows)
        for indices in length_buckets(lengths, self.batch_size):
            batch = self.tokenizer.pad([rows[i] for i in indices], padding_side="right", return_tensors="pt")
            logits = self.model(**batch.to(device)).logits
            _check_labels(self.__name__, logits.shape[-1])
            for i, logit in zip(indices, logits[:, 0].tolist(), strict=True):
                scores[i] = logit
        return scores


def load_tokenizer_of(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model; `ValueError` if there is none."""
    with loading_model(name, "tokenizer of the reward model", "put the tokenizer's files there"):
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def _check_labels(name: str, n_labels: int) -> None:
    if n_labels != 1:
        raise ValueError(
            f"The reward model {name} has {n_labels} labels, and a reward is one number: take a model with one label, "
            "or write a reward function that makes one number of them."
        )


def _load_classifier(name: str, kwargs: dict) -> torch.nn.Module:
    """The classifier, after a check that its head was loaded and not drawn anew."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what was not loaded is told below, in one sentence
    remedy = "give the folder or the hub id of a sequence classifier, or the dotted path of a reward function"
    try:
        with loading_model(name, "reward model", remedy):
            adapter = PeftConfig.from_pretrained(name) if find_adapter_config_file(name) else None
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                adapter.base_model_name_or_path if adapter else name,
                num_labels=1,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **{"dtype": "auto", **kwargs},
            )
            missing = set(loading["missing_keys"])
            if adapter:
                trained = tuple(adapter.modules_to_save or ())
                missing = {key for key in missing if not key.startswith(trained)}
                model = PeftModel.from_pretrained(model, name).merge_and_unload()
    finally:
        logging.set_verbosity(verbosity)
    for key, found, _ in loading["mismatched_keys"]:
        _check_labels(name, found[0])
        raise ValueError(f"The reward model {name} does not fit its own configuration: {key} has the shape {found}.")
    if missing:
        raise ValueError(
            f"The model {name} is no reward model: it has no weights {', '.join(sorted(missing))}, and random ones "
            "would give every run other scores. Take a sequence classifier that was trained as a reward model."
        )
    return model


def _max_length(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest text in tokens that the model reads; None for no limit."""
    limits = [tokenizer.model_max_length]  # 1e30 if it is not known
    if positions := getattr(model.config.get_text_config(), "max_position_embeddings", None):
        # RoBERTa and its like count positions from after the padding's.
        offsets = [
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        ]
        limits.append(positions - max(offsets, default=0))
    return min(limits) if min(limits) < 10**9 else None
