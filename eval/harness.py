"""Evaluates one policy into one JSON record; tables, plots and reports are drawn from the records alone.

The record's keys are the contract of docs and design: they stand in one dataclass, [`Record`], so none can be absent.
A key that does not apply is null.
"""

import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset

from baselines.policy import Completions, Policy, encode_prompts, score
from eval.likelihood import likelihood
from eval.refusals import refusal_rate
from eval.stats import distinct_n, mean_ci, paired_delta, top_ngram_share, win_rate
from trl_proxy.files import write_text
from trl_proxy.rewards import to_text
from trl_proxy.runs import installed_version

# The keys of a record that have an entry for every prompt
PER_PROMPT = ("rewards", "responses", "prompts", "gold_rewards", "kinds", "trace")
PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "datasets", "bitsandbytes", "trl-proxy")


@dataclass(kw_only=True)
class Run:
    """What is evaluated: the part of a record that the caller knows.

    `settings` are the choices beyond the contract's keys that change the result (batch size, temperature, hashes of
    weights, ...): a record counts as done only for equal ones.
    """

    method: str  # sft, proxy, best_of_n, dpo, rlhf, ...
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
        """`<output_dir>/records/<method>-seed<k>.json`, the variant after the method where there is one."""
        variant = "" if self.variant is None else "-" + re.sub(r"[^\w.=]+", "_", self.variant)
        return Path(output_dir) / "records" / f"{self.method}{variant}-seed{self.seed}.json"


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
    trace: list | None  # of every token of every response: its text, and the texts that were rejected before it

    def write(self, output_dir: str | os.PathLike) -> Path:
        """Writes the record and returns its path."""
        path = self.path(output_dir)
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False))
        return path


def read_record(path: str | os.PathLike) -> dict:
    """One record file.

    Raises:
        ValueError: if it is damaged or lacks a key of the contract.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # half a file, or no UTF-8
        raise ValueError(f"{path} is no whole JSON file ({error}): delete it and evaluate again.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is no record but a JSON {type(record).__name__}: delete it and evaluate again.")
    for name in ("trace", "lm_tokens_per_response", "reward_calls_per_response"):
        record.setdefault(name, None)  # records had none once, and can do without
    if missing := Record.__dataclass_fields__.keys() - record.keys():
        raise ValueError(f"{path} lacks {sorted(missing)}: write it again with --overwrite.")
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


def write_summaries(output_dir: str | os.PathLike, folder: str | os.PathLike) -> list[Path]:
    """Writes the records of `output_dir` to `folder`, by the same names, without what they say of single prompts."""
    paths = []
    for path in sorted((Path(output_dir) / "records").glob("*.json")):
        summary = {key: value for key, value in read_record(path).items() if key not in PER_PROMPT}
        paths.append(Path(folder) / path.name)
        write_text(paths[-1], json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return paths


def prompts_sha256(prompts: list) -> str:
    """Hash of the prompts, in order, plain or conversational."""
    return hashlib.sha256(json.dumps(prompts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Python's and the installed packages' versions."""
    installed = {name: version for name in PACKAGES if (version := installed_version(name))}
    return {"python": platform.python_version(), **installed}


def git_commit() -> str | None:
    """Commit of this checkout, `-dirty` where tracked files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def summarise(rewards, gold_rewards, texts, baseline) -> dict:
    """Means, paired deltas and intervals of one group of prompts; `baseline`: the same prompts of the SFT record."""
    summary = {
        "reward_mean": float(np.mean(rewards)),
        "reward_ci95": mean_ci(rewards),
        "gold_reward_mean": None if gold_rewards is None else float(np.mean(gold_rewards)),
        "gold_reward_ci95": None if gold_rewards is None else mean_ci(gold_rewards),
        "refusal_rate": refusal_rate(texts),
    }
    for key, values, name in (("delta", rewards, "rewards"), ("gold_delta", gold_rewards, "gold_rewards")):
        paired = baseline is not None and values is not None and baseline[name] is not None
        delta = paired_delta(values, baseline[name]) if paired else None
        summary[f"{key}_vs_sft"] = float(delta.mean()) if paired else None
        summary[f"{key}_ci95"] = mean_ci(delta) if paired else None
    return summary


def _settle_ties(values: list[float] | None, texts: list[str], baseline: dict, name: str) -> list[float] | None:
    """The scores, those of SFT's own responses being SFT's where only rounding parts them: who shares a batch moves a
    score by about 1e-6, which would decide a tie."""
    if values is None or baseline[name] is None:
        return values
    rows = zip(values, texts, baseline[name], baseline["responses"], strict=True)
    return [
        theirs if text == same and math.isclose(mine, theirs, abs_tol=1e-4) else mine
        for mine, text, theirs, same in rows
    ]


def _pick(values: list | None, rows: list[int]) -> list | None:
    return None if values is None else [values[i] for i in rows]


def evaluate_completions(
    completions: Completions,
    prompts: Dataset,
    reward,
    gold_reward,
    lm,
    tokenizer,
    *,
    run: Run,
    output_dir: str | os.PathLike,
    baseline_record: dict | None = None,
    tokens_per_second_sft: float | None = None,
    policy_lm=None,
    judge: str | None = None,
    batch_size: int = 8,
) -> dict:
    """Scores responses and writes their record.

    Args:
        completions: one response per prompt.
        prompts: column `prompt`, plain or conversational; optional column `kind`. Other columns go to the rewards.
        reward, gold_reward: in TRL's calling convention; `gold_reward` may be None.
        lm, tokenizer: the frozen LM that judges how likely the responses are.
        run: what the caller knows of the method.
        baseline_record: the SFT record over the same prompts; None for SFT itself.
        tokens_per_second_sft: SFT's speed in the same run; None where it was not measured, and for SFT itself.
        policy_lm: the causal LM whose next-token distribution the policy follows, for `kl_to_lm`; None where there is
            none (best-of-n, candidate features).
        judge: who decided the wins; the reward by default.
        batch_size: rows per forward of the likelihood.

    Returns:
        the record, as it was written.

    Raises:
        ValueError: if the baseline record is of other prompts, or a reward returns no finite number.
    """
    digest = prompts_sha256(prompts["prompt"][:])
    if baseline_record is not None and baseline_record["prompts_sha256"] != digest:
        raise ValueError(
            f"baseline_record has other prompts (sha256 {baseline_record['prompts_sha256'][:12]}, not {digest[:12]}): "
            "evaluate SFT on the same prompts first."
        )
    conversations, texts = prompts["prompt"][:], completions.texts
    columns = {name: prompts[name][:] for name in prompts.column_names if name != "prompt"}
    rewards = score(reward, conversations, texts, **columns)
    gold_rewards = None if gold_reward is None else score(gold_reward, conversations, texts, **columns)
    if baseline_record is not None:
        rewards = _settle_ties(rewards, texts, baseline_record, "rewards")
        gold_rewards = _settle_ties(gold_rewards, texts, baseline_record, "gold_rewards")
    overall = summarise(rewards, gold_rewards, texts, baseline_record)

    kinds, by_kind = columns.get("kind"), {}
    for kind in sorted(set(kinds or [])):
        rows = [i for i, k in enumerate(kinds) if k == kind]
        baseline = None
        if baseline_record is not None:
            baseline = {name: _pick(baseline_record[name], rows) for name in ("rewards", "gold_rewards")}
        by_kind[kind] = {
            "n_prompts": len(rows),
            **summarise(_pick(rewards, rows), _pick(gold_rewards, rows), _pick(texts, rows), baseline),
        }

    wins = None if baseline_record is None else win_rate(rewards, baseline_record["rewards"])
    n_tokens = sum(map(len, completions.token_ids))
    speed = n_tokens / completions.seconds
    tokens = encode_prompts(conversations, tokenizer), completions.token_ids
    logprobs, kl = likelihood(lm, *tokens, policy_lm=policy_lm, batch_size=batch_size)
    record = Record(
        **asdict(run),
        **overall,
        n_prompts=len(texts),
        win_rate_vs_sft=None if wins is None else wins.rate,
        win_rate_ci95=None if wins is None else wins.ci95,
        tie_rate=None if wins is None else wins.tie_rate,
        judge=None if wins is None else judge or f"reward {run.reward_model}",
        by_kind=by_kind,
        lm_logprob_per_token=math.fsum(logprobs) / n_tokens,
        kl_to_lm=kl,
        response_tokens_mean=n_tokens / len(texts),
        distinct_2=distinct_n(texts, 2),
        lm_forwards_per_token=completions.lm_forwards / n_tokens,
        lm_tokens_per_response=completions.lm_forwards / len(texts),
        reward_calls_per_response=completions.reward_calls / len(texts),
        tokens_per_second=speed,
        tokens_per_second_sft=speed if run.method == "sft" else tokens_per_second_sft,
        reject_rate=completions.stats.get("reject_rate"),
        accepted_rank_mean=completions.stats.get("accepted_rank_mean"),
        rewards=rewards,
        responses=texts,
        prompts_sha256=digest,
        versions=package_versions(),
        git_commit=git_commit(),
        command=shlex.join(sys.orig_argv),
        top_4gram_share=top_ngram_share(texts, 4),
        gold_rewards=gold_rewards,
        kinds=kinds,
        prompts=[to_text(prompt, "user") for prompt in conversations],
        trace=completions.trace,
    )
    record.write(output_dir)
    return asdict(record)


def evaluate_policy(policy: Policy, prompts: Dataset, reward, gold_reward, lm, tokenizer, **kwargs) -> dict:
    """Lets the policy answer the prompts, scores the answers and writes the record; arguments and result as
    [`evaluate_completions`]."""
    completions = policy.complete(prompts["prompt"][:])
    return evaluate_completions(completions, prompts, reward, gold_reward, lm, tokenizer, **kwargs)
