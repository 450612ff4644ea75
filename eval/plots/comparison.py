"""Figures of a comparison, drawn from its records alone."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from eval.comparison import Comparison, kind_title, mean_over_seeds
from eval.plots import style
from eval.stats import win_scores

UNTRAINED = ("sft", "best_of_n")  # they cost no training


def plot_reward_distributions(comparison: Comparison, path: str | os.PathLike) -> Path:
    """A row per method: density of the rewards over the prompts (all seeds together), its mean with a 95 % interval,
    and SFT's density as a dashed line to compare with."""
    groups, sft = comparison.groups, comparison.sft
    rewards = {name: np.array([record["rewards"] for record in group]) for name, group in groups.items()}
    colors = {name: look["color"] for name, look in style.styles_by_method(groups).items()}
    dashed = None if sft is None else next(name for name, group in groups.items() if group[0]["method"] == "sft")
    return style.draw_distributions(rewards, colors, path, title=style.title(comparison), dashed=dashed)


def _beside_sft(comparison: Comparison, what: str) -> dict[str, list[dict]]:
    """The methods that are measured against SFT; `ValueError` if there is no SFT, or nothing else."""
    if comparison.sft is None or not comparison.others:
        raise ValueError(f"{what} need an SFT record and another method's: run scripts/compare.py with both.")
    return comparison.others


def plot_gains(comparison: Comparison, path: str | os.PathLike) -> Path:
    """Bars of the paired gain over SFT, for all prompts and for each kind; whiskers are 95 % intervals, dots seeds.

    Raises:
        ValueError: if there is no SFT record, or no other record.
    """
    kinds, groups = comparison.kinds, _beside_sft(comparison, "gains")
    looks = style.styles_by_method(comparison.groups)
    width = 0.8 / len(groups)
    several = any(len(group) > 1 for group in groups.values())
    with plt.rc_context(style.RC):
        inches = max(6.0, 1.0 + 0.4 * len(groups) * (1 + len(kinds)))
        figure, axis = plt.subplots(figsize=(inches, 4.2), layout="constrained")
        for i, (name, group) in enumerate(groups.items()):
            for position, kind in enumerate([None, *kinds]):
                x = position + (i - (len(groups) - 1) / 2) * width
                mean, interval = comparison.gain(group, kind)
                axis.bar(
                    x,
                    mean,
                    width * 0.9,
                    color=looks[name]["color"],
                    edgecolor="white",
                    hatch=looks[name]["hatch"],
                    label=name if position == 0 else None,
                )
                if interval is not None:
                    error = [[mean - interval[0]], [interval[1] - mean]]
                    axis.errorbar(x, mean, yerr=error, color="black", capsize=3, linewidth=1.2)
                if len(group) > 1:
                    seeds = [comparison.gain([record], kind)[0] for record in group]
                    dots = [x + 0.25 * width] * len(seeds)  # next to the whisker
                    axis.plot(dots, seeds, "o", color="white", markeredgecolor="black", markersize=4, zorder=3)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(1 + len(kinds)), ["all prompts", *map(kind_title, kinds)])
        axis.grid(axis="x", visible=False)
        axis.set_ylabel("gain in reward over SFT")
        axis.set_title(style.title(comparison), loc="left", size=9)
        axis.set_xlabel("whiskers: 95 % interval" + ("; dots: seeds" if several else ""))
        figure.legend(loc="outside upper center", ncols=_columns(groups))
        return style.save(figure, path)


def plot_win_rates(comparison: Comparison, path: str | os.PathLike) -> Path:
    """A bar per method: share of the prompts won, tied and lost against SFT, all seeds together; the dot is the win
    rate, a tie counting half, with its 95 % interval.

    Raises:
        ValueError: if there is no SFT record, or no other record.
    """
    sft, groups = comparison.sft, _beside_sft(comparison, "win rates")
    with plt.rc_context(style.RC):
        figure, axis = plt.subplots(figsize=(7, 1.6 + 0.5 * len(groups)), layout="constrained")
        for row, group in enumerate(groups.values()):
            scores = np.stack([win_scores(record["rewards"], sft["rewards"]) for record in group])
            left = 0.0
            parts = (("won", 1, "#0072B2", ""), ("tied", 0.5, "#BBBBBB", ".."), ("lost", 0, "#E69F00", "//"))
            for name, score, color, hatch in parts:
                share = float((scores == score).mean())
                look = {"color": color, "hatch": hatch, "edgecolor": "white", "alpha": 0.75}
                axis.barh(row, share, 0.7, left=left, label=name if row == 0 else None, **look)
                left += share
            rate, interval = comparison.win_rate(group)
            axis.plot(rate, row, "o", color="black", markeredgecolor="white", markersize=8, zorder=4)
            if interval is not None:
                error = [[rate - interval[0]], [interval[1] - rate]]
                axis.errorbar(rate, row, xerr=error, color="black", capsize=4, linewidth=1.5, zorder=3)
            axis.text(1.01, row, f"{rate:.2f}", va="center")
        axis.axvline(0.5, color="black", linestyle=":", linewidth=1)
        axis.set_yticks(range(len(groups)), list(groups))
        axis.invert_yaxis()
        axis.set_xlim(0, 1.08)
        axis.set_xticks(np.linspace(0, 1, 6))
        axis.grid(visible=False)
        axis.set_xlabel("share of prompts; dot: win rate, ties as half; 95 % interval")
        axis.set_title(style.title(comparison), loc="left", size=9)
        figure.legend(loc="outside upper right", ncols=3)
        return style.save(figure, path)


def plot_reward_against_logprob(comparison: Comparison, path: str | os.PathLike) -> Path:
    """Mean reward against the responses' log-prob per token under the frozen LM, a point per method and seed.

    Up is better, right is nearer to the LM's own text; a line joins the n of best-of-n.
    """
    groups = comparison.groups
    looks = style.styles_by_method(groups)
    with plt.rc_context(style.RC):
        figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
        best_of_n = [record for group in groups.values() for record in group if record["method"] == "best_of_n"]
        for seed in {record["seed"] for record in best_of_n}:
            line = [record for record in best_of_n if record["seed"] == seed]
            xy = ([r["lm_logprob_per_token"] for r in line], [r["reward_mean"] for r in line])
            axis.plot(*xy, color="grey", linestyle=":", linewidth=1, zorder=1)
        labelled = set()
        for name, group in groups.items():
            color, marker = looks[name]["color"], looks[name]["marker"]
            legend = "best_of_n" if group[0]["method"] == "best_of_n" else name
            for record in group:
                x, y, interval = record["lm_logprob_per_token"], record["reward_mean"], record["reward_ci95"]
                if interval is not None:
                    axis.vlines(x, *interval, color=color, alpha=0.45, linewidth=1.2)
                axis.plot(
                    x,
                    y,
                    marker,
                    color=color,
                    markersize=9,
                    markeredgecolor="white",
                    label=None if legend in labelled else legend,
                )
                labelled.add(legend)
                if record["method"] == "best_of_n":
                    axis.annotate(record["variant"], (x, y), xytext=(8, -3), textcoords="offset points", size=8)
        axis.margins(x=0.1)
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlabel("LM log-prob per response token, nats (right: nearer to the LM's own text)")
        axis.set_ylabel("mean reward, 95 % interval")
        axis.set_title(style.title(comparison), loc="left", size=9)
        figure.legend(loc="outside upper center", ncols=_columns(groups), handlelength=1)
        return style.save(figure, path)


def threshold_of(record: dict) -> float:
    """The gate's threshold at inference, from the settings or the variant; 0, the default, if neither names one."""
    if record["settings"].get("threshold") is not None:
        return float(record["settings"]["threshold"])
    found = re.search(r"threshold=([^,\s]+)", record["variant"] or "")
    return float(found[1]) if found else 0.0


def plot_reward_against_threshold(comparison: Comparison, path: str | os.PathLike) -> Path:
    """Mean reward of proxies by their threshold at inference: a line per variant (all seeds together) with 95 %
    intervals, and SFT's mean as a dashed line. It shows how far alignment can be turned without training.

    Raises:
        ValueError: if the records have fewer than two thresholds.
    """
    lines: dict[str, dict[float, list[dict]]] = {}
    for name, group in comparison.groups.items():
        base = re.sub(r",? ?threshold=[^,)]+", "", name)
        for record in group:
            if record["method"] == "proxy":
                lines.setdefault(base, {}).setdefault(threshold_of(record), []).append(record)
    if len({threshold for line in lines.values() for threshold in line}) < 2:
        raise ValueError("records have one threshold only: evaluate a proxy at others too.")
    sft = comparison.sft
    with plt.rc_context(style.RC):
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        for i, (name, line) in enumerate(lines.items()):
            thresholds = sorted(line)
            rewards = [np.array([record["rewards"] for record in line[threshold]]) for threshold in thresholds]
            look = {"color": style.COLORS[(i + 1) % 7], "marker": style.MARKERS[(i + 1) % 7]}
            style.draw_means(axis, thresholds, rewards, label=name, linestyle=style.LINE_STYLES[i % 4], **look)
        if sft is not None:
            axis.axhline(sft["reward_mean"], color="black", linestyle="--", linewidth=1, label="sft")
        axis.set_xlabel("threshold of the accept logit at inference (right: rejects more)")
        axis.set_ylabel("mean reward, 95 % interval")
        axis.set_title(style.title(comparison), loc="left", size=9)
        figure.legend(loc="outside upper center", ncols=_columns(lines))
        return style.save(figure, path)


def plot_cost_against_gain(comparison: Comparison, path: str | os.PathLike) -> Path:
    """Gain over SFT with its 95 % interval against what it costs: LM forwards per response token when answering, and
    minutes of training (0 for methods that are not trained). Up and left is better.

    Raises:
        ValueError: if there is no SFT record, or no other record.
    """
    groups = _beside_sft(comparison, "costs")
    looks = style.styles_by_method(comparison.groups)
    costs = {"lm_forwards_per_token": "LM forwards per response token", "train_seconds": "training, minutes"}
    with plt.rc_context(style.RC):
        figure, axes = plt.subplots(1, 2, figsize=(8.5, 4), sharey=True, layout="constrained")
        for axis, (key, title) in zip(axes, costs.items(), strict=True):
            for name, group in groups.items():
                cost = mean_over_seeds(group, key)
                if key == "train_seconds" and group[0]["method"] in UNTRAINED:
                    cost = 0.0
                if cost is None:
                    continue  # not measured
                mean, interval = comparison.gain(group)
                look = {"color": looks[name]["color"], "marker": looks[name]["marker"], "linestyle": "none"}
                error = None if interval is None else [[mean - interval[0]], [interval[1] - mean]]
                x = cost / 60 if key == "train_seconds" else cost
                label = "best_of_n" if group[0]["method"] == "best_of_n" else name
                axis.errorbar(x, mean, yerr=error, label=label, capsize=3, markersize=8, **look)
                if label == "best_of_n":
                    axis.annotate(group[0]["variant"], (x, mean), xytext=(8, 3), textcoords="offset points", size=8)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_xlabel(title)
            axis.margins(x=0.15)
        axes[0].set_xscale("log", base=2)
        axes[0].xaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("gain in reward over SFT, 95 % interval")
        figure.suptitle(style.title(comparison), size=9)
        handles, names = axes[0].get_legend_handles_labels()
        legend = dict(zip(names, handles))  # best-of-n once
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=_columns(legend))
        return style.save(figure, path)


def draw_all(comparison: Comparison, output_dir: str | os.PathLike) -> list[Path]:
    """Every figure that the records allow, under `<output_dir>/plots`; returns the PNGs. A proxy at a threshold other
    than its own appears only in the figure of thresholds."""
    folder = Path(output_dir) / "plots"
    own = comparison.only(lambda record: record["settings"].get("threshold") is None)
    paths = [plot_reward_distributions(own, folder / "reward_distributions")]
    if own.sft is not None and own.others:
        paths.append(plot_gains(own, folder / "gains"))
        paths.append(plot_win_rates(own, folder / "win_rates"))
        paths.append(plot_cost_against_gain(own, folder / "cost_against_gain"))
    paths.append(plot_reward_against_logprob(own, folder / "reward_against_logprob"))
    if len({threshold_of(record) for record in comparison.records if record["method"] == "proxy"}) > 1:
        paths.append(plot_reward_against_threshold(comparison, folder / "reward_against_threshold"))
    return paths


def _columns(names: Iterable[str]) -> int:
    """Columns of a legend outside the axes: about 80 characters fit side by side in the narrowest figure."""
    names = list(names)
    return max(min(len(names), 3, 80 // (max(map(len, names), default=1) + 8)), 1)
