"""Evaluates one policy into one JSON record; tables, plots and reports are drawn from the records alone.

The record's keys are a contract: one dataclass, [`Record`], holds them all, so none can be absent. A key that does not
apply is null.
"""

import math
import os
import shlex
import sys
from dataclasses import asdict

import numpy as np
from datasets import Dataset

from baselines.policy import Completions, Policy
from eval.likelihood import likelihood
from eval.records import READER_KEYS, READER_KIND_KEYS, Record, Run, git_commit, package_versions, prompts_sha256
from eval.refusals import refusal_rate
from eval.stats import distinct_n, mean_ci, paired_delta, top_ngram_share, win_rate
from trl_proxy.decoding.settings import DecodingSettings
from trl_proxy.prompts import to_text
from trl_proxy.rewards.caller import as_caller


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
    """The scores, with SFT's score for a response equal to SFT's if the two differ only by rounding. The batch changes
    a score by about 1e-6, which would decide a tie."""
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
    decoding: DecodingSettings,
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
        reward, gold_reward: in TRL's calling convention, or [`~trl_proxy.rewards.RewardCaller`]s; `gold_reward` may be
            None.
        lm: the frozen LM, which tells how likely the responses are.
        decoding: how the responses were decoded.
        run: what the caller knows of the method.
        baseline_record: the SFT record over the same prompts; None for SFT itself.
        tokens_per_second_sft: SFT's speed in the same run; None if it was not measured, and for SFT itself.
        policy_lm: the causal LM whose next-token distribution the policy follows, for `kl_to_lm`; None if there is
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
    answers = conversations, texts, completions.token_ids, columns
    rewards = as_caller(reward).score(*answers)
    gold_rewards = None if gold_reward is None else as_caller(gold_reward).score(*answers)
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
            **dict.fromkeys(READER_KIND_KEYS),
        }

    wins = None if baseline_record is None else win_rate(rewards, baseline_record["rewards"])
    n_tokens = sum(map(len, completions.token_ids))
    speed = n_tokens / completions.seconds
    tokens = decoding.encode(conversations), completions.token_ids
    logprobs, kl = likelihood(lm, *tokens, policy_lm=policy_lm, batch_size=batch_size)
    record = Record(
        **asdict(run),
        **overall,
        n_prompts=len(texts),
        win_rate_vs_sft=None if wins is None else wins.rate,
        win_rate_ci95=None if wins is None else wins.ci95,
        tie_rate=None if wins is None else wins.tie_rate,
        judge=None if wins is None else judge or f"reward {run.reward_model}",
        **dict.fromkeys(READER_KEYS),
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
        decoding=decoding.as_dict(),
    )
    record.write(output_dir)
    return asdict(record)


def evaluate_policy(policy: Policy, prompts: Dataset, reward, gold_reward, lm, decoding, **kwargs) -> dict:
    """Lets the policy answer the prompts, scores the answers and writes the record; arguments and result as in
    [`evaluate_completions`]."""
    completions = policy.complete(prompts["prompt"][:])
    return evaluate_completions(completions, prompts, reward, gold_reward, lm, decoding, **kwargs)
