"""Figures of training and of sweeps, drawn from TRL's log histories (`trainer_state.json`) and from the records."""

import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from eval import drawing
from eval.harness import read_records
from eval.report import find_sft, group_records
from trl_proxy.config import CONFIG_NAME
from trl_proxy.runs import RESULTS_FILE, RUN_FILE


class TrainingLog(NamedTuple):
    """A `trainer_state.json` as TRL's trainers write it, and the episodes that one optimizer step stands for."""

    trainer_state: str | os.PathLike
    episodes_per_step: float


def read_json(path: str | os.PathLike) -> dict:
    """The JSON object in a file; `ValueError` naming the file where there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): let the training finish, or leave its folder out."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: let the training finish, or leave its folder out.")
    return content


def training_log(folder: str | os.PathLike) -> TrainingLog:
    """The log history of a finished run of scripts/train_proxy.py or scripts/train_baseline.py, as the plots take it.

    Raises:
        ValueError: if the run is not finished, or a file of it is damaged.
    """
    results = read_json(Path(folder, RESULTS_FILE))
    return TrainingLog(Path(folder, "trainer_state.json"), results["episodes"] / results["steps"])


def training_points(log: TrainingLog, key: str) -> np.ndarray:
    """(episodes, seconds of training, value) of every log entry that has a number for `key`, shape (entries, 3); NaN
    for seconds that were not logged."""
    points = [
        (entry["step"] * log.episodes_per_step, entry.get("train_seconds", np.nan), entry[key])
        for entry in read_json(log.trainer_state)["log_history"]
        if not np.isnan(entry.get(key, np.nan))  # a reward function that judged no prompt of these has no mean
    ]
    return np.array(points).reshape(-1, 3)


def _reward_keys(log: TrainingLog) -> set[str]:
    """Names under which a log has the mean of each reward function, of rollouts or of evaluations."""
    names = {name.removeprefix("eval_") for entry in read_json(log.trainer_state)["log_history"] for name in entry}
    return {name for name in names if re.fullmatch(r"rewards/.+/mean", name)}


def comparable_keys(runs: dict[str, list[TrainingLog]]) -> dict[str, str]:
    """Keys of the logs by which these runs can be compared, with what they are: of several methods the mean of each
    reward function that all of them log, since they may weigh them, or draw prompts of each kind, differently; else
    the reward."""
    shared = sorted(set.intersection(*(_reward_keys(log) for seeds in runs.values() for log in seeds)))
    if len(runs) == 1 or len(shared) < 2:
        return {"reward": "mean reward of the rollouts"}
    return {key: f"mean {key.removeprefix('rewards/').removesuffix('/mean')}" for key in shared}


def running_mean(points: np.ndarray, smooth: int) -> np.ndarray:
    """Mean over the last `smooth` log entries, none in the future, and half of its 95 % interval.

    The interval comes from the spread of the entries in the window (normal approximation), so it holds the noise of
    the batches, and a little too much where the reward rises fast.

    Args:
        points: (episodes, value), shape (entries, 2).
        smooth: entries in the window, at most all of them.

    Returns:
        (episodes, mean, half width), shape (entries - smooth + 1, 3); NaN for the half width of a window of one.
    """
    n = min(smooth, len(points))
    windows = np.lib.stride_tricks.sliding_window_view(points[:, 1], n)
    half = 1.96 * windows.std(axis=1, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(windows), np.nan)
    return np.stack([points[n - 1 :, 0], windows.mean(axis=1), half], axis=1)


def _logged(run: TrainingLog, *keys: str) -> list[np.ndarray]:
    """[`training_points`] of each key; `ValueError`, naming the first, where the log has none of any."""
    points = [training_points(run, key) for key in keys]
    if not any(map(len, points)):
        rewards = sorted(_reward_keys(run))
        raise ValueError(
            f"{run.trainer_state} logs no {keys[0]!r}{f' but {rewards}' if rewards else ''}: train with it, and "
            "logging_steps below the number of steps."
        )
    return points


def plot_training_curve(
    runs: dict[str, list[TrainingLog]],
    path: str | os.PathLike,
    *,
    keys: dict[str, str] | None = None,
    smooth: float = 0.1,
) -> Path:
    """Reward of the rollouts against training episodes, and against seconds where they were logged: a running mean per
    seed, and evaluations on held-out prompts as markers, where there are any of either.

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
    with plt.rc_context(drawing.RC):
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
        return drawing.save(figure, path)


def _draw_runs(axis, seeds: list[list[np.ndarray]], column: int, i: int, name: str, smooth: float):
    """The i-th method's running means and evaluations against the points' `column`."""
    look = {"color": drawing.COLORS[(i + 1) % 7]}
    for k, (train, evaluations) in enumerate(seeds):
        if len(train):  # DPO, say, has no rollouts
            mean = running_mean(train[:, [column, 2]], max(1, round(smooth * len(train))))
            label = name if k == 0 else None
            axis.plot(*mean[:, :2].T, linestyle=drawing.LINE_STYLES[i % 4], linewidth=1.6, label=label, **look)
        if len(evaluations):
            label = f"{name}, held-out prompts" if k == 0 else None
            look_at = {"markersize": 7, "markeredgecolor": "white", "marker": drawing.MARKERS[i % 7], **look}
            # Beside the rollouts' line markers stand alone; where there is none they are joined.
            line = "none" if len(train) else drawing.LINE_STYLES[i % 4]
            axis.plot(*evaluations[:, [column, 2]].T, linestyle=line, label=label, **look_at)


def plot_over_optimisation(
    runs: dict[str, TrainingLog], gold: str, path: str | os.PathLike, *, smooth: int = 5
) -> Path:
    """The training reward above, the gold reward below, against training episodes; bands are 95 % intervals of the
    running mean. A dotted line marks where a run's gold reward was highest: what the training reward gains after it
    is over-optimisation (Gao et al. 2023, arXiv 2210.10760).

    Args:
        runs: name of the run -> its log.
        gold: name under which the log has the reward that is not trained on, i.e. `rewards/<gold>/mean`: a reward
            function whose weight in `reward_weights` is 0.
        smooth: log entries in the running mean.

    Raises:
        ValueError: if a log has no reward, or not that gold reward.
    """
    titles = {"reward": "training reward", f"rewards/{gold}/mean": f"gold reward: {gold}"}
    with plt.rc_context(drawing.RC):
        figure, axes = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
        for i, (name, run) in enumerate(runs.items()):
            color, line = drawing.COLORS[(i + 1) % 7], drawing.LINE_STYLES[i % 4]
            for axis, key in zip(axes, titles, strict=True):
                episodes, mean, half = running_mean(_logged(run, key)[0][:, [0, 2]], smooth).T
                axis.plot(episodes, mean, color=color, linestyle=line, linewidth=1.8, label=name)
                axis.fill_between(episodes, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
            for axis in axes:  # the gold reward came last
                axis.axvline(episodes[mean.argmax()], color=color, linestyle=":", linewidth=1.2)
        for axis, label in zip(axes, titles.values(), strict=True):
            axis.set_ylabel(label)
        axes[1].set_xlabel("training episodes; band: 95 % interval; dotted: where the gold reward was highest")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", handlelength=3)
        return drawing.save(figure, path)


class Cell(NamedTuple):
    """One run of a sweep: the value that was swept, the records of its comparison, and its training log."""

    value: float
    records: list[dict]
    log: TrainingLog


def read_sweep(folder: str | os.PathLike, key: str) -> list[Cell]:
    """The runs of a sweep, by value and folder.

    Args:
        folder: every folder in it is the output folder of scripts/train_proxy.py, with the `records` of
            scripts/compare.py in it; several of one value are its seeds.
        key: what was swept, as proxy_config.json or run.json names it, e.g. `p_t`.

    Raises:
        ValueError: if there is no run, one is not finished or lacks the key, or the records are not comparable.
    """
    cells = []
    for config in sorted(Path(folder).glob(f"*/{CONFIG_NAME}")):
        run_file = config.with_name(RUN_FILE)
        settings = {**(read_json(run_file) if run_file.is_file() else {}), **read_json(config)}
        if not isinstance(settings.get(key), int | float):
            raise ValueError(f"{config} has no number for {key!r}: name what was swept, such as p_t or temperature.")
        records = read_records(config.parent)
        if sum(record["method"] == "proxy" for record in records) != 1:
            raise ValueError(
                f"{config.parent / 'records'} must hold one proxy's record: compare every run on its own."
            )
        cells.append(Cell(settings[key], records, training_log(config.parent)))
    if not cells:
        raise ValueError(f"no trained proxy in a folder of {folder}: give each run of the sweep one of its own.")
    group_records([record for cell in cells for record in cell.records])  # refuses other prompts or LMs
    return sorted(cells, key=lambda cell: cell.value)


def _sweep_rewards(cells: list[Cell]) -> dict[float, np.ndarray]:
    """Value -> the proxies' rewards, shape (seeds, n)."""
    rewards: dict[float, list] = {}
    for cell in cells:
        rewards.setdefault(cell.value, []).extend(r["rewards"] for r in cell.records if r["method"] == "proxy")
    return {value: np.array(rows) for value, rows in rewards.items()}


def plot_sweep_scores(cells: list[Cell], key: str, path: str | os.PathLike) -> Path:
    """Mean test reward per swept value with its 95 % interval, seeds as dots, SFT's mean as a dashed line (figures 3a
    and 3b of arXiv 2403.04283). The values stand at equal distances, whatever their scale."""
    rewards, sft = _sweep_rewards(cells), find_sft(cells[0].records)
    with plt.rc_context(drawing.RC):
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        drawing.draw_means(
            axis, range(len(rewards)), list(rewards.values()), color=drawing.COLORS[1], marker="o", label="proxy"
        )
        for x, values in enumerate(rewards.values()):
            if len(values) > 1:  # beside the whisker
                look = {"color": "white", "markeredgecolor": "black", "markersize": 4}
                axis.plot([x + 0.08] * len(values), values.mean(axis=1), "o", **look)
        if sft is not None:
            axis.axhline(sft["reward_mean"], color="black", linestyle="--", linewidth=1, label="sft")
        axis.set_xticks(range(len(rewards)), [f"{value:g}" for value in rewards])
        axis.margins(x=0.1)
        axis.set_xlabel(key)
        axis.set_ylabel("mean test reward, 95 % interval")
        axis.set_title(drawing.title(cells[0].records), loc="left", size=9)
        axis.legend()
        return drawing.save(figure, path)


def plot_sweep_curves(cells: list[Cell], key: str, path: str | os.PathLike, *, smooth: int = 5) -> Path:
    """Training reward against episodes, a panel per value with a line per seed, the other values' in grey; bands are
    95 % intervals of the running mean.

    Raises:
        ValueError: if a log has no reward.
    """
    runs: dict[float, list[np.ndarray]] = {}
    for cell in cells:
        curve = running_mean(_logged(cell.log, "reward")[0][:, [0, 2]], smooth)
        runs.setdefault(cell.value, []).append(curve.T)
    shape = -(-len(runs) // 2), min(2, len(runs))
    with plt.rc_context(drawing.RC):
        size = (3.5 * shape[1], 2.2 * shape[0] + 0.4)
        figure, axes = plt.subplots(
            *shape, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(runs) :]:
            axis.set_axis_off()
        for i, (axis, value) in enumerate(zip(axes.flat, runs)):
            axis.set_title(f"{key} = {value:g}", loc="left", size=9)
            for episodes, mean, _ in (curve for other in runs if other != value for curve in runs[other]):
                axis.plot(episodes, mean, color="0.75", linewidth=0.8)
            color = drawing.COLORS[(i + 1) % 7]
            for line, (episodes, mean, half) in zip(itertools.cycle(drawing.LINE_STYLES), runs[value]):
                axis.plot(episodes, mean, color=color, linestyle=line, linewidth=1.6)
                axis.fill_between(episodes, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
        figure.supxlabel("training episodes; a line per seed, other values in grey; band: 95 % interval", size=9)
        figure.supylabel("mean reward of the rollouts", size=9)
        return drawing.save(figure, path)


def plot_sweep_distributions(cells: list[Cell], key: str, path: str | os.PathLike) -> Path:
    """A row per swept value: density of the test rewards, their mean and its 95 % interval; SFT's density dashed."""
    sft = find_sft(cells[0].records)
    rewards = {} if sft is None else {"sft": np.array([sft["rewards"]])}
    rewards |= {f"{key} = {value:g}": rows for value, rows in _sweep_rewards(cells).items()}
    colors = {name: drawing.COLORS[(i + (sft is None)) % 7] for i, name in enumerate(rewards)}
    title = drawing.title(cells[0].records)
    return drawing.draw_distributions(rewards, colors, path, title=title, dashed=None if sft is None else "sft")


def draw_sweep(cells: list[Cell], key: str, output_dir: str | os.PathLike) -> list[Path]:
    """The three figures of a sweep, under `<output_dir>/plots`; returns the PNGs."""
    folder = Path(output_dir) / "plots"
    return [
        plot_sweep_scores(cells, key, folder / f"sweep_{key}_scores"),
        plot_sweep_curves(cells, key, folder / f"sweep_{key}_curves"),
        plot_sweep_distributions(cells, key, folder / f"sweep_{key}_distributions"),
    ]
