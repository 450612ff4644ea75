"""The columns of published tables: what a row of [`eval.published`] shows under a title."""

from collections.abc import Callable

import numpy as np

from eval.published import SHOWN_KINDS, Row
from eval.report.tables import with_interval


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def gain(kind: str | None = None, gold: bool = False, interval: bool = True) -> Callable[[Row], str]:
    """The gain over SFT, on one kind of prompts or all, by the training or the gold reward."""
    key, name = ("gold_delta_vs_sft", "gold_gain") if gold else ("delta_vs_sft", "gain")

    def cell(row: Row) -> str:
        value = row.mean(key) if kind is None else row.mean("by_kind", kind, key)
        if value is None:
            return ""
        found = row.intervals.get(name if kind is None else f"{name}_{kind}") if interval else None
        return with_interval(value, found, "+.2f")

    return cell


def by_seed(row: Row) -> str:
    values = [record["delta_vs_sft"] for record in row.records]
    return "" if None in values else ", ".join(f"{value:+.2f}" for value in values)


def trainable(row: Row) -> str:
    count, total = row.records[0]["trainable_parameters"], row.records[0]["total_parameters"]
    return f"{count:,}" + (f" ({100 * count / (total - count):.2f} %)" if count else "")  # of the LM's


def win_rate(row: Row) -> str:
    value = row.mean("win_rate_vs_sft")
    return "" if value is None else with_interval(value, row.intervals.get("win_rate"), ".2f")


def readers(row: Row) -> str:
    """Blind readers' win rate: the mean over the seeds that were read. Older lines lack the key."""
    found = [record.get("reader_win_rate_vs_sft") for record in row.records]
    read = [value for value in found if value is not None]
    return with_interval(float(np.mean(read)), row.intervals.get("reader_win_rate"), ".2f") if read else ""


def refusals(row: Row) -> str:
    return " / ".join(percent(row.mean("by_kind", kind, "refusal_rate")) for kind in SHOWN_KINDS)


def mean(key: str, form: str, unit: float = 1.0, after: str = "") -> Callable[[Row], str]:
    """The mean over seeds of a key, in `unit`."""

    def cell(row: Row) -> str:
        value = row.mean(key)
        return "" if value is None else format(value / unit, form) + after

    return cell


def seconds_per_1000(row: Row) -> str:
    seconds, episodes = row.mean("train_seconds"), row.mean("episodes")
    return "" if seconds is None or not episodes else f"{1000 * seconds / episodes:,.0f}"


def speed(row: Row) -> str:
    ratios = [r["tokens_per_second"] / r["tokens_per_second_sft"] for r in row.records if r["tokens_per_second_sft"]]
    return f"{np.mean(ratios):.2f}" if ratios else ""


def lm_tokens(row: Row) -> str:
    return f"{np.mean([r['lm_forwards_per_token'] * r['response_tokens_mean'] for r in row.records]):.0f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row.name,
    "seeds": lambda row: str(len(row.records)),
    "machine": lambda row: row.records[0]["machine"],
    "trainable parameters": trainable,
    "reward": mean("reward_mean", ".2f"),
    "gain": gain(),
    "gain, seed by seed": by_seed,
    "seed by seed": by_seed,
    "gain, everyday": gain("everyday"),
    "gain, harm-adjacent": gain("harm_adjacent"),
    "everyday": gain("everyday", interval=False),
    "harm-adjacent": gain("harm_adjacent", interval=False),
    "gold gain": gain(gold=True),
    "gold gain, everyday": gain("everyday", gold=True),
    "gold gain, harm-adjacent": gain("harm_adjacent", gold=True),
    "win rate": win_rate,
    "readers": readers,
    "refusals, everyday": lambda row: percent(row.mean("by_kind", "everyday", "refusal_rate")),
    "refusals, harm-adjacent": lambda row: percent(row.mean("by_kind", "harm_adjacent", "refusal_rate")),
    "refusals, everyday / harm-adjacent": refusals,
    "commonest four words": lambda row: percent(row.mean("top_4gram_share")),
    "LM log-prob per token": mean("lm_logprob_per_token", ".2f"),
    "LM forwards per token": mean("lm_forwards_per_token", ".2f"),
    "rejected proposals": lambda row: percent(row.mean("reject_rate")),
    "file": mean("adapter_bytes", ".1f", 1e6, " MB"),
    "episodes": mean("episodes", ",.0f"),
    "training": mean("train_seconds", ",.0f", after=" s"),
    "seconds per 1,000 episodes": seconds_per_1000,
    "peak memory of training": mean("train_peak_memory_mb", ".1f", 2**10, " GB"),
    "LM tokens per response": lm_tokens,
    "tokens/s, x SFT": speed,
}
