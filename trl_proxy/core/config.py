"""The configuration of a proxy, [`ProxyConfig`], and the paths of its files."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Literal

from ..files import write_text
from .values import check_values

CONFIG_NAME = "proxy_config.json"
WEIGHTS_NAME = "proxy_model.safetensors"
# Fields of [`ProxyConfig`] that the model fills in.
MODEL_FIELDS = ("hidden_size", "embedding_size", "base_model_name_or_path", "base_model_sha256", "decoding")
# What `decoding` may have.
_DECODING: dict[str, type] = {"generation_kwargs": dict, "chat_template_kwargs": dict, "system_prompt": str}


@dataclass
class ProxyConfig:
    """What the LM proposes, what the gate reads and how large the gate is.

    If the paper gives no value, the default is the best we measured: see docs/method.md.
    """

    p_t: float = field(
        default=0.05,
        metadata={"help": "Smallest probability a candidate may have (the paper sweeps 0.1, 0.01, 0.001, 0.0001)."},
    )
    p_t_mode: Literal["relative", "absolute"] = field(
        default="relative",
        metadata={"help": "`relative`: p_t times the highest probability, as in min-p. `absolute`: p_t itself."},
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
            "help": "Which of the LM's hidden states the gate reads, counted as in transformers: 0 is the embeddings, "
            "k the output of layer k, -1 the last state."
        },
    )
    pooled_features: bool = field(
        default=True,
        metadata={
            "help": "The gate also reads the mean of the hidden states so far: what the whole conversation is about. "
            "Continuous batching needs `false`."
        },
    )
    gate_hidden_sizes: list[int] = field(
        default_factory=lambda: [256], metadata={"help": "Widths of the gate's hidden layers; the critic's too."}
    )
    initial_accept_bias: float = field(
        default=1.0, metadata={"help": "Accept logit of a new gate, at least 0: a greedy new gate accepts everything."}
    )
    threshold: float = field(
        default=0.0, metadata={"help": "A greedy decision accepts a logit of at least this; larger aligns harder."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Hidden size of the LM; filled in by the model."})
    embedding_size: int | None = field(default=None, metadata={"help": "Embedding size; filled in by the model."})
    base_model_name_or_path: str | None = field(default=None, metadata={"help": "The LM; filled in by the model."})
    base_model_sha256: str | None = field(
        default=None, metadata={"help": "Checksum of the LM, see `fingerprint.lm_sha256`; filled in by the model."}
    )
    decoding: dict | None = field(
        default=None,
        metadata={
            "help": "How the LM was decoded in training, beyond its own generation_config.json: `generation_kwargs`, "
            "`chat_template_kwargs`, `system_prompt`; filled in by the trainer."
        },
    )

    def __post_init__(self):
        """Raises `ValueError` naming the field, its value and what is allowed."""
        check_values(self)
        if not self.gate_hidden_sizes:
            raise ValueError(f"`gate_hidden_sizes` must be one or more widths, got {self.gate_hidden_sizes}.")
        if not self.feature_layers or len(set(self.feature_layers)) < len(self.feature_layers):
            raise ValueError(f"`feature_layers` must be one or more layers, none twice, got {self.feature_layers}.")
        for name, value in (self.decoding or {}).items():
            if name not in _DECODING or not isinstance(value, _DECODING[name] | None):
                allowed = ", ".join(f"{known} ({kind.__name__})" for known, kind in _DECODING.items())
                raise ValueError(f"`decoding` may have {allowed}, got {{{name!r}: {value!r}}}.")

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `proxy_config.json`."""
        write_text(os.path.join(save_directory, CONFIG_NAME), json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder_or_id: str | os.PathLike, **hub_kwargs) -> "ProxyConfig":
        """Reads `proxy_config.json` from a folder or a hub repository; raises `ValueError` if there is none."""
        try:
            with open(proxy_file(folder_or_id, CONFIG_NAME, **hub_kwargs), encoding="utf-8") as file:
                values = json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{CONFIG_NAME} of {folder_or_id} is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{CONFIG_NAME} of {folder_or_id} must be a JSON object, got {type(values).__name__}.")
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"{CONFIG_NAME} of {folder_or_id} has unknown keys: {', '.join(sorted(unknown))}.")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{CONFIG_NAME} of {folder_or_id}: {error}") from error


def proxy_file(folder_or_id: str | os.PathLike, name: str, **hub_kwargs) -> str:
    """Path of a proxy's file in a local folder, or downloaded from the hub; `ValueError` if there is no proxy."""
    folder_or_id = os.fspath(folder_or_id)
    if os.path.isdir(folder_or_id):
        path = os.path.join(folder_or_id, name)
        if not os.path.isfile(path):
            raise ValueError(f"{folder_or_id} holds no proxy: {name} is missing{_in_checkpoint(folder_or_id, name)}.")
        return path
    # Imported here: a local folder needs no hub, and `core` needs only torch.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return hf_hub_download(folder_or_id, name, **hub_kwargs)
    except GatedRepoError as error:
        raise ValueError(
            f"The hub repository {folder_or_id} is gated: ask for access on its page, and log in with `hf auth login`."
        ) from error
    except (RemoteEntryNotFoundError, HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"{folder_or_id} is neither a folder nor a hub repository that holds a proxy ({name})."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"The hub repository {folder_or_id} has no revision {hub_kwargs.get('revision')!r}."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{folder_or_id} is not a folder here, and the hub could not be reached for {name}: check the path, or "
            "the network."
        ) from error
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The hub did not give {name} of {folder_or_id} ({reason}): try again later.") from error
    except OSError as error:  # a full disk, a rate limit
        raise ValueError(f"{name} of {folder_or_id} could not be downloaded from the hub ({error}).") from error


def _in_checkpoint(folder: str, name: str) -> str:
    """The end of a sentence that says where an unfinished training has a file."""
    found = [other for other in os.listdir(folder) if os.path.isfile(os.path.join(folder, other, name))]
    newest = max(found, key=lambda other: (len(other), other), default=None)
    return f", but {os.path.join(folder, newest)} has it" if newest else ""
