"""Figures of a sweep."""

import itertools
import math
import os
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from eval.plots.comparison import style
from eval.sweep import Sweep, SweepRun
from eval.training_logs import (
    _logged,
    running_mean,
)


def _sweep_rewards(cells: list[SweepRun]) -> dict[float, np.ndarray]:
    """Value -> the proxies' rewards, shape (seeds, n)."""
    rewards: dict[float, list] = {}
    for cell in cells:
        rewards.setdefault(cell.value, []).extend(r["rewards"] for r in cell.records if r["method"] == "proxy")
    return {value: np.array(rows) for value, rows in rewards.items()}


def plot_sweep_scores(sweep: Sweep, path: str | os.PathLike) -> Path:
    """Mean test reward per swept value with its 95 % interval, seeds as dots, SFT's mean as a dashed line (figures 3a
    and 3b of arXiv 2403.04283). The values stand at equal distances, whatever their scale."""
    rewards, sft = _sweep_rewards(sweep.cells), sweep.comparison.sft
    with plt.rc_context(style.RC):
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        style.draw_means(
            axis, range(len(rewards)), list(rewards.values()), color=style.COLORS[1], marker="o", label="proxy"
        )
        for x, values in enumerate(rewards.values()):
            if len(values) > 1:  # next to the whisker
                look = {"color": "white", "markeredgecolor": "black", "markersize": 4}
                axis.plot([x + 0.08] * len(values), values.mean(axis=1), "o", **look)
        if sft is not None:
            axis.axhline(sft["reward_mean"], color="black", linestyle="--", linewidth=1, label="sft")
        axis.set_xticks(range(len(rewards)), [f"{value:g}" for value in rewards])
        axis.margins(x=0.1)
        axis.set_xlabel(sweep.key)
        axis.set_ylabel("mean test reward, 95 % interval")
        axis.set_title(style.title(sweep.comparison), loc="left", size=9)
        axis.legend()
        return style.save(figure, path)


def plot_sweep_curves(sweep: Sweep, path: str | os.PathLike, *, smooth: int = 5) -> Path:
    """Training reward against episodes: a panel per value with a line per seed, other values in grey. Bands are 95 %
    intervals of the running mean.

    Raises:
        ValueError: if a log has no reward.
    """
    runs: dict[float, list[np.ndarray]] = {}
    for cell in sweep.cells:
        curve = running_mean(_logged(cell.log, "reward")[0][:, [0, 2]], smooth)
        runs.setdefault(cell.value, []).append(curve.T)
    shape = math.ceil(len(runs) / 2), min(2, len(runs))
    with plt.rc_context(style.RC):
        size = (3.5 * shape[1], 2.2 * shape[0] + 0.4)
        figure, axes = plt.subplots(
            *shape, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(runs) :]:
            axis.set_axis_off()
        for i, (axis, value) in enumerate(zip(axes.flat, runs)):
            axis.set_title(f"{sweep.key} = {value:g}", loc="left", size=9)
            for episodes, mean, _ in (curve for other in runs if other != value for curve in runs[other]):
                axis.plot(episodes, mean, color="0.75", linewidth=0.8)
            color = style.COLORS[(i + 1) % 7]
            for line, (episodes, mean, half) in zip(itertools.cycle(style.LINE_STYLES), runs[value]):
                axis.plot(episodes, mean, color=color, linestyle=line, linewidth=1.6)
                axis.fill_between(episodes, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
        figure.supxlabel("training episodes; a line per seed, other values in grey; band: 95 % interval", size=9)
        figure.supylabel("mean reward of the rollouts", size=9)
        return style.save(figure, path)


def plot_sweep_distributions(sweep: Sweep, path: str | os.PathLike) -> Path:
    """A row per swept value: density of the test rewards, their mean and its 95 % interval; SFT's density dashed."""
    sft = sweep.comparison.sft
    rewards = {} if sft is None else {"sft": np.array([sft["rewards"]])}
    rewards |= {f"{sweep.key} = {value:g}": rows for value, rows in _sweep_rewards(sweep.cells).items()}
    colors = {name: style.COLORS[(i + (sft is None)) % 7] for i, name in enumerate(rewards)}
    title = style.title(sweep.comparison)
    return style.draw_distributions(rewards, colors, path, title=title, dashed=None if sft is None else "sft")


def draw_sweep(sweep: Sweep, output_dir: str | os.PathLike) -> list[Path]:
    """The three figures of a sweep, under `<output_dir>/plots`; returns the PNGs."""
    folder = Path(output_dir) / "plots"
    return [
        plot_sweep_scores(sweep, folder / f"sweep_{sweep.key}_scores"),
        plot_sweep_curves(sweep, folder / f"sweep_{sweep.key}_curves"),
        plot_sweep_distributions(sweep, folder / f"sweep_{sweep.key}_distributions"),
    ]
