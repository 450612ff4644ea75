"""Figures, drawn from the record files alone (the training curve from TRL's `trainer_state.json`).

Colours are Okabe and Ito's, which the colour-blind tell apart; rows, hatches, markers and line styles tell the methods
apart in grey too. Every figure is written as PNG and SVG.
"""

import json
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no display

import numpy as np
from matplotlib import pyplot as plt
from scipy.stats import gaussian_kde

from eval.report import all_kinds, delta_over_seeds, find_sft, group_records, kind_title
from eval.stats import seeds_mean_ci

# Okabe & Ito 2008, 'Color Universal Design'; without yellow, which is too light for a line on white
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINE_STYLES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "trl-proxy",  # equal records give equal files
}


def _save(figure, path: str | os.PathLike) -> Path:
    """Writes `path` as PNG and its twin as SVG; returns the PNG's path."""
    path = Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return path


def _title(records: list[dict]) -> str:
    return f"reward: {records[0]['reward_model']}; {records[0]['n_prompts']} prompts"


def _looks(groups: dict[str, list[dict]]) -> dict[str, dict[str, str]]:
    """Colour, marker and hatch of every method, the same in all figures; best-of-n has one colour for all n."""
    families = {name: "best_of_n" if group[0]["method"] == "best_of_n" else name for name, group in groups.items()}
    order = list(dict.fromkeys(families.values()))
    return {
        name: {
            "color": COLORS[order.index(families[name]) % len(COLORS)],
            "marker": MARKERS[order.index(families[name]) % len(MARKERS)],
            "hatch": HATCHES[i % len(HATCHES)],
        }
        for i, name in enumerate(groups)
    }


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray | None:
    """Gaussian kernel density on the grid; None where the values have no spread to estimate one from."""
    return gaussian_kde(values.ravel())(grid) if values.size > 1 and np.ptp(values) > 0 else None


def plot_reward_distributions(records: list[dict], path: str | os.PathLike) -> Path:
    """A row per method: density of the rewards over the prompts (all seeds together), its mean with a 95 % interval,
    and SFT's density as a dashed line to compare with."""
    groups = group_records(records)
    looks, sft = _looks(groups), find_sft(records)
    everything = np.concatenate([record["rewards"] for record in records])
    margin = 0.25 * np.ptp(everything) or 1.0
    grid = np.linspace(everything.min() - margin, everything.max() + margin, 400)
    rewards = {name: np.array([record["rewards"] for record in group]) for name, group in groups.items()}
    densities = {name: _density(values, grid) for name, values in rewards.items()}
    peak = max((density.max() for density in densities.values() if density is not None), default=1.0)
    sft_density = None if sft is None else _density(np.array(sft["rewards"]), grid)
    with plt.rc_context(STYLE):
        size = (7, 1.0 + 0.85 * len(groups))
        figure, axes = plt.subplots(len(groups), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
        for axis, (name, group) in zip(axes[:, 0], groups.items(), strict=True):
            color, density = looks[name]["color"], densities[name]
            mean, interval = rewards[name].mean(), seeds_mean_ci(rewards[name])
            if density is not None:
                axis.fill_between(grid, density, color=color, alpha=0.25, linewidth=0)
                axis.plot(grid, density, color=color, linewidth=1.5)
            if sft_density is not None and group[0] is not sft:
                axis.plot(grid, sft_density, color="black", linestyle="--", linewidth=0.9)
            axis.vlines(mean, 0, peak, color=color, linewidth=1.2)
            if interval is not None:
                axis.fill_betweenx([0, peak], *interval, color=color, alpha=0.35, linewidth=0)
            text = f"{mean:.2f}" if interval is None else f"{mean:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
            axis.text(1, 0.98, text, transform=axis.transAxes, ha="right", va="top")
            axis.text(0, 0.98, name, transform=axis.transAxes, ha="left", va="top", weight="bold")
            axis.set_yticks([])
            axis.set_ylim(0, 1.4 * peak)  # room for the text
            axis.spines["left"].set_visible(False)
        axes[-1, 0].set_xlabel("reward over the prompts; line and band: mean and its 95 % interval; dashed: sft")
        figure.suptitle(_title(records), size=9)
        return _save(figure, path)


def plot_gains(records: list[dict], path: str | os.PathLike) -> Path:
    """Bars of the paired gain over SFT, for all prompts and for each kind; whiskers are 95 % intervals, dots seeds.

    Raises:
        ValueError: if there is no SFT record, or nothing beside it.
    """
    sft, kinds, groups = find_sft(records), all_kinds(records), group_records(records)
    looks = _looks(groups)
    groups = {name: group for name, group in groups.items() if group[0]["method"] != "sft"}
    if sft is None or not groups:
        raise ValueError("gains need an SFT record and another method's: run scripts/compare.py with both.")
    width = 0.8 / len(groups)
    several = any(len(group) > 1 for group in groups.values())
    with plt.rc_context(STYLE):
        inches = max(6.0, 1.0 + 0.4 * len(groups) * (1 + len(kinds)))
        figure, axis = plt.subplots(figsize=(inches, 4.2), layout="constrained")
        for i, (name, group) in enumerate(groups.items()):
            for position, kind in enumerate([None, *kinds]):
                x = position + (i - (len(groups) - 1) / 2) * width
                mean, interval = delta_over_seeds(group, sft, kind)
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
                    seeds = [delta_over_seeds([record], sft, kind)[0] for record in group]
                    dots = [x + 0.25 * width] * len(seeds)  # beside the whisker
                    axis.plot(dots, seeds, "o", color="white", markeredgecolor="black", markersize=4, zorder=3)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(1 + len(kinds)), ["all prompts", *map(kind_title, kinds)])
        axis.grid(axis="x", visible=False)
        axis.set_ylabel("gain in reward over SFT")
        axis.set_title(_title(records), loc="left", size=9)
        axis.set_xlabel("whiskers: 95 % interval" + ("; dots: seeds" if several else ""))
        # About 80 characters fit beside one another in the narrowest figure.
        longest = max((len(name) for name in groups), default=1)
        figure.legend(loc="outside upper center", ncols=min(len(groups), 3, max(80 // (longest + 8), 1)))
        return _save(figure, path)


def plot_reward_against_logprob(records: list[dict], path: str | os.PathLike) -> Path:
    """Mean reward against the responses' log-prob per token under the frozen LM, a point per method and seed.

    Up is better, right is nearer to what the LM would say itself; the n of best-of-n are joined.
    """
    groups = group_records(records)
    looks = _looks(groups)
    with plt.rc_context(STYLE):
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
        axis.set_title(_title(records), loc="left", size=9)
        figure.legend(loc="outside right upper", handlelength=1)
        return _save(figure, path)


def training_points(trainer_state: str | os.PathLike, episodes_per_step: float, key: str) -> np.ndarray:
    """(episodes, value) of every log entry of a `trainer_state.json` that has `key`, shape (entries, 2)."""
    history = json.loads(Path(trainer_state).read_text(encoding="utf-8"))["log_history"]
    return np.array([[entry["step"] * episodes_per_step, entry[key]] for entry in history if key in entry]).reshape(
        -1, 2
    )


def plot_training_curve(
    runs: dict[str, tuple[str | os.PathLike, float]], path: str | os.PathLike, *, smooth: int = 5
) -> Path:
    """Reward against training episodes: rollouts faint, their running mean as a line, evaluations as markers.

    Args:
        runs: name of the run -> its `trainer_state.json`, as TRL's trainer writes it, and the episodes that one
            optimizer step stands for.
        smooth: log entries in the running mean.

    Raises:
        ValueError: if a log has no reward.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        for i, (name, (state, episodes_per_step)) in enumerate(runs.items()):
            color, line = COLORS[(i + 1) % len(COLORS)], LINE_STYLES[i % len(LINE_STYLES)]
            train = training_points(state, episodes_per_step, "reward")
            evaluations = training_points(state, episodes_per_step, "eval_reward")
            if len(train) == 0:
                raise ValueError(
                    f"{state} logs no 'reward': train with logging_steps smaller than the number of steps."
                )
            n = min(smooth, len(train))
            mean = np.convolve(
                train[:, 1], np.ones(n) / n, mode="valid"
            )  # over the last n entries, none in the future
            axis.plot(*train.T, color=color, alpha=0.3, linewidth=0.8)
            axis.plot(train[n - 1 :, 0], mean, color=color, linestyle=line, linewidth=1.8, label=f"{name}, rollouts")
            if len(evaluations):
                axis.plot(
                    *evaluations.T,
                    MARKERS[i % len(MARKERS)],
                    color=color,
                    markersize=7,
                    markeredgecolor="white",
                    label=f"{name}, held-out prompts",
                )
        axis.set_xlabel("training episodes")
        axis.set_ylabel("mean reward")
        axis.legend(handlelength=3)
        return _save(figure, path)


def plot_benchmark(cells: list[dict], path: str | os.PathLike) -> Path:
    """Speed of every method of scripts/benchmark.py against plain sampling's in the same round, along each axis of its
    grid: medians, and the range of the rounds. Methods that are not in every cell are left out."""
    axes_titles = {
        "batch_size": "rows in the batch",
        "prompt_tokens": "prompt length, tokens",
        "new_tokens": "new tokens",
        "reject_rate": "share of decisions that reject",
    }
    base = cells[0]
    names = [name for name in base["methods"] if all(name in cell["methods"] for cell in cells)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(axes_titles), figsize=(12, 3.6), sharey=True, layout="constrained")
        for axis, (key, title) in zip(axes, axes_titles.items(), strict=True):
            line = [cell for cell in cells if all(cell[k] == base[k] for k in axes_titles if k != key)]
            line.sort(key=lambda cell: cell[key])
            x = [cell[key] for cell in line]
            for i, name in enumerate(names):
                found = [cell["methods"][name] for cell in line]
                y = np.array([r["ratio"] for r in found])
                spread = [y - [r["ratio_min"] for r in found], [r["ratio_max"] for r in found] - y]
                look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
                axis.errorbar(x, y, spread, label=name, capsize=2, linestyle=LINE_STYLES[i % 4], linewidth=1.2, **look)
            if key != "reject_rate":
                axis.set_xscale("log", base=2)
                axis.set_xticks(x, [str(value) for value in x])
                axis.minorticks_off()
            axis.set_xlabel(title)
        axes[0].set_ylabel("tokens/s, x generate, sampled")
        axes[0].set_ylim(bottom=0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return _save(figure, path)


def draw_all(records: list[dict], output_dir: str | os.PathLike) -> list[Path]:
    """Every figure that the records allow, under `<output_dir>/plots`; returns the PNGs."""
    folder = Path(output_dir) / "plots"
    paths = [plot_reward_distributions(records, folder / "reward_distributions")]
    if find_sft(records) is not None and any(record["method"] != "sft" for record in records):
        paths.append(plot_gains(records, folder / "gains"))
    paths.append(plot_reward_against_logprob(records, folder / "reward_against_logprob"))
    return paths
