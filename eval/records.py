"""One JSON record per method and seed: every evaluation writes one, and all tables and plots are drawn from them."""

import hashlib
import json
import os
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict, get_type_hints

from trl_proxy.core.values import type_flaw
from trl_proxy.files import write_text
from trl_proxy.runs.process import installed_version

# The keys of a record that have an entry for every prompt
PER_PROMPT = ("rewards", "responses", "prompts", "gold_rewards", "kinds", "trace", "reader_scores")
# The keys that blind readers fill later, in a record and in each of its kinds; null if nobody read its responses
READER_KIND_KEYS = ("reader_win_rate_vs_sft", "reader_win_rate_ci95", "reader_tie_rate")
READER_KEYS = (*READER_KIND_KEYS, "reader_agreement", "reader_labels", "reader_scores")
PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "datasets", "bitsandbytes", "trl-proxy")


@dataclass(kw_only=True)
class Run:
    """What is evaluated: the part of a record that the caller knows.

    `settings` are the choices beyond the contract's keys that change the result (batch size, temperature, hashes of
    weights, ...): a record counts as done only for equal ones.
    """

    method: str  # sft, proxy, best_of_n, dpo, ppo, ...
    variant: str | None = None  # "candidate", "n=32", "lora_r=16", ...
    seed: int
    model: str
    reward_model: str
    gold_reward_model: str | None = None
    dataset: str  # with its revision or sha256
    max_new_tokens: int
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    adapter_bytes: int | None = None
    episodes: int | None = None
    train_seconds: float | None = None
    train_peak_memory_mb: float | None = None
    settings: dict = field(default_factory=dict)
    started_at: str = ""  # ISO 8601; the time of building this object by default

    def __post_init__(self):
        self.started_at = self.started_at or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def path(self, output_dir: str | os.PathLike) -> Path:
        """`<output_dir>/records/<method>-seed<k>.json`, with the variant, if any, after the method. A name from a
        trained folder cannot lead out of there."""
        parts = [self.method] if self.variant is None else [self.method, self.variant]
        name = "-".join(re.sub(r"[^\w.=]+", "_", part) for part in [*parts, f"seed{self.seed}"])
        return Path(output_dir) / "records" / f"{name}.json"


@dataclass(kw_only=True)
class Record(Run):
    """Everything that an evaluation writes. Intervals are `[low, high]` at 95 %; deltas are paired by prompt.

    None of these fields has a default, so forgetting one fails at once.
    """

    n_prompts: int
    reward_mean: float
    reward_ci95: list[float] | None
    delta_vs_sft: float | None
    delta_ci95: list[float] | None
    gold_reward_mean: float | None  # of a reward that no method trains on
    gold_reward_ci95: list[float] | None
    gold_delta_vs_sft: float | None
    gold_delta_ci95: list[float] | None
    win_rate_vs_sft: float | None  # a tie counts half
    win_rate_ci95: list[float] | None
    tie_rate: float | None
    judge: str | None  # who decides which of two responses wins
    reader_win_rate_vs_sft: float | None  # of the pairs that blind readers decided
    reader_win_rate_ci95: list[float] | None
    reader_tie_rate: float | None  # of all pairs with a verdict; the same response twice is a tie
    reader_agreement: float | None  # share of the pairs with several readers on which all of them agree
    reader_labels: dict[str, dict[str, float]] | None  # kind, or `all`, -> label -> responses
    by_kind: dict[str, dict]
    lm_logprob_per_token: float | None  # nats, under the frozen LM
    kl_to_lm: float | None  # nats per token, of the policy with sampled decisions, over the responses' positions
    response_tokens_mean: float
    distinct_2: float | None
    lm_forwards_per_token: float | None
    lm_tokens_per_response: float | None  # what an answer costs: tokens that went through the LM ...
    reward_calls_per_response: float | None  # ... and responses that a reward scored
    tokens_per_second: float
    tokens_per_second_sft: float | None  # of the same run: a ratio across runs says nothing on a busy machine
    reject_rate: float | None
    accepted_rank_mean: float | None
    rewards: list[float]
    responses: list[str]
    prompts_sha256: str
    versions: dict[str, str]
    git_commit: str | None
    command: str
    # Beyond the contract: what pairing by prompt, plots and samples need, and a sign of collapse
    refusal_rate: float
    top_4gram_share: float | None
    gold_rewards: list[float] | None
    kinds: list[str] | None
    prompts: list[str]
    decoding: dict | None  # the decoding settings
    reader_scores: list[float | None] | None  # 1 win, 0.5 tie, 0 loss against SFT, null for an unread pair
    trace: list | None  # of every token of every response: its text, and the texts that were rejected before it

    def write(self, output_dir: str | os.PathLike) -> Path:
        """Writes the record and returns its path."""
        path = self.path(output_dir)
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False))
        return path


_Interval = tuple[float, float] | None


class _OfKind(TypedDict):
    """What a record says of the prompts of one kind."""

    n_prompts: int
    reward_mean: float
    reward_ci95: _Interval
    refusal_rate: float
    delta_vs_sft: float | None
    delta_ci95: _Interval
    gold_reward_mean: NotRequired[float | None]
    gold_reward_ci95: NotRequired[_Interval]
    gold_delta_vs_sft: NotRequired[float | None]
    gold_delta_ci95: NotRequired[_Interval]
    reader_win_rate_vs_sft: NotRequired[float | None]
    reader_win_rate_ci95: NotRequired[_Interval]
    reader_tie_rate: NotRequired[float | None]


# The types of a record's keys in its file, more exactly than the dataclass has them.
_IN_FILE = {
    **{name: _Interval if name.endswith("_ci95") else hint for name, hint in get_type_hints(Record).items()},
    "by_kind": dict[str, _OfKind],
    "trace": list[list[tuple[str, list[str]]]] | None,
}


def read_record(path: str | os.PathLike) -> dict:
    """One record file.

    Raises:
        ValueError: if it is damaged, lacks a key of the contract or has a value of another type; the file and the key
            are named.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # half a file, or no UTF-8
        raise ValueError(f"{path} is no whole JSON file ({error}): delete it and evaluate again.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is no record but a JSON {type(record).__name__}: delete it and evaluate again.")
    for name in ("trace", "decoding", "lm_tokens_per_response", "reward_calls_per_response", *READER_KEYS):
        record.setdefault(name, None)  # older records lack these
    if missing := Record.__dataclass_fields__.keys() - record.keys():
        raise ValueError(f"{path} lacks {sorted(missing)}: write it again with --overwrite.")
    for name, hint in _IN_FILE.items():
        if flaw := type_flaw(record[name], hint, name):
            raise ValueError(f"{path} is damaged ({flaw}): delete it and evaluate again.")
    for of_kind in record["by_kind"].values():
        of_kind |= dict.fromkeys(READER_KIND_KEYS) | of_kind
    for name in PER_PROMPT:
        values, expected = record[name], record["n_prompts"]
        if values is not None and len(values) != expected:
            raise ValueError(f"{path} has {len(values)} {name} for {expected} prompts: delete it and evaluate again.")
    return record


def read_records(output_dir: str | os.PathLike) -> list[dict]:
    """All records under an output folder, by file name.

    Raises:
        ValueError: if there are none, or one is damaged or lacks a key of the contract.
    """
    paths = sorted((Path(output_dir) / "records").glob("*.json"))
    if not paths:
        raise ValueError(f"no records under {Path(output_dir) / 'records'}: run scripts/compare.py first.")
    return [read_record(path) for path in paths]


def prompts_sha256(prompts: list) -> str:
    """Hash of the prompts, in order, plain or conversational."""
    return hashlib.sha256(json.dumps(prompts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Python's and the installed packages' versions."""
    installed = {name: version for name in PACKAGES if (version := installed_version(name))}
    return {"python": platform.python_version(), **installed}


def git_commit() -> str | None:
    """Commit of this checkout, with `-dirty` if tracked files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
