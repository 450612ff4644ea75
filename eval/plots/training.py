"""Figures of trainings, drawn from their logs."""

import os
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from eval.plots.comparison import style
from eval.training_logs import TrainingLog, _logged, comparable_keys, running_mean


def plot_training_curve(
    runs: dict[str, list[TrainingLog]],
    path: str | os.PathLike,
    *,
    keys: dict[str, str] | None = None,
    smooth: float = 0.1,
) -> Path:
    """Rollout reward against training episodes, and against seconds if every run logged them. Lines are running means
    per seed, markers are evaluations on held-out prompts; a run may have only one of the two.

    Args:
        runs: name of the method -> its runs, one per seed.
        keys: what is drawn, a row of panels each: the log's key -> the label; by default [`comparable_keys`].
        smooth: share of a run's log entries in the running mean.

    Raises:
        ValueError: if a log has neither for one of the keys.
    """
    keys = keys or comparable_keys(runs)
    points = {
        (name, key): [_logged(run, key, f"eval_{key}") for run in seeds]
        for name, seeds in runs.items()
        for key in keys
    }
    timed = not any(np.isnan(x[:, 1]).any() for seeds in points.values() for both in seeds for x in both)
    titles = ["training episodes, log scale", "seconds of training"][: 1 + timed]
    with plt.rc_context(style.RC):
        size = (4.5 * len(titles) + 1, 1 + 3 * len(keys))
        figure, axes = plt.subplots(
            len(keys), len(titles), figsize=size, sharex="col", sharey="row", squeeze=False, layout="constrained"
        )
        for row, (key, label) in enumerate(keys.items()):
            for column, axis in enumerate(axes[row]):
                for i, name in enumerate(runs):
                    _draw_runs(axis, points[name, key], column, i, name, smooth)
            axes[row, 0].set_ylabel(label)
        for axis, title in zip(axes[-1], titles, strict=True):
            axis.set_xlabel(title)
        for axis in axes[:, 0]:
            axis.set_xscale("log")  # an update of the whole LM costs as much as many of a gate
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=3)
        return style.save(figure, path)


def _draw_runs(axis, seeds: list[list[np.ndarray]], column: int, i: int, name: str, smooth: float):
    """The i-th method's running means and evaluations against the points' `column`."""
    look = {"color": style.COLORS[(i + 1) % 7]}
    for k, (train, evaluations) in enumerate(seeds):
        if len(train):  # DPO, say, has no rollouts
            mean = running_mean(train[:, [column, 2]], max(1, round(smooth * len(train))))
            label = name if k == 0 else None
            axis.plot(*mean[:, :2].T, linestyle=style.LINE_STYLES[i % 4], linewidth=1.6, label=label, **look)
        if len(evaluations):
            label = f"{name}, held-out prompts" if k == 0 else None
            look_at = {"markersize": 7, "markeredgecolor": "white", "marker": style.MARKERS[i % 7], **look}
            # Without a line of rollouts, the markers are joined.
            line = "none" if len(train) else style.LINE_STYLES[i % 4]
            axis.plot(*evaluations[:, [column, 2]].T, linestyle=line, label=label, **look_at)


def plot_over_optimisation(
    runs: dict[str, TrainingLog], gold: str, path: str | os.PathLike, *, smooth: int = 5
) -> Path:
    """The training reward above, the gold reward below, against training episodes; bands are 95 % intervals of the
    running mean. A dotted line marks a run's highest gold reward: any later gain of the training reward is
    over-optimisation (Gao et al. 2023, arXiv 2210.10760).

    Args:
        runs: name of the run -> its log.
        gold: name under which the log has the reward that is not trained on, i.e. `rewards/<gold>/mean`: a reward
            function whose weight in `reward_weights` is 0.
        smooth: log entries in the running mean.

    Raises:
        ValueError: if a log has no reward, or not that gold reward.
    """
    titles = {"reward": "training reward", f"rewards/{gold}/mean": f"gold reward: {gold}"}
    with plt.rc_context(style.RC):
        figure, axes = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
        for i, (name, run) in enumerate(runs.items()):
            color, line = style.COLORS[(i + 1) % 7], style.LINE_STYLES[i % 4]
            for axis, key in zip(axes, titles, strict=True):
                episodes, mean, half = running_mean(_logged(run, key)[0][:, [0, 2]], smooth).T
                axis.plot(episodes, mean, color=color, linestyle=line, linewidth=1.8, label=name)
                axis.fill_between(episodes, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
            for axis in axes:  # the gold reward came last
                axis.axvline(episodes[mean.argmax()], color=color, linestyle=":", linewidth=1.2)
        for axis, label in zip(axes, titles.values(), strict=True):
            axis.set_ylabel(label)
        axes[1].set_xlabel("training episodes; band: 95 % interval; dotted: highest gold reward")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", handlelength=3)
        return style.save(figure, path)
