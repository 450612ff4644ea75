"""What a training logged, as points that plots take."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trl_proxy.core.values import type_flaw
from trl_proxy.runs.resume import RESULTS_FILE, read_json


class TrainingLog(NamedTuple):
    """A `trainer_state.json` as TRL's trainers write it, and the episodes that one optimizer step stands for."""

    trainer_state: str | os.PathLike
    episodes_per_step: float


def read_training_file(path: str | os.PathLike) -> dict:
    """The JSON object in a file; `ValueError` naming the file if there is none."""
    remedy = "let the training finish, or leave its folder out"
    try:
        return read_json(path, remedy)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): {remedy}.") from error


def training_log(folder: str | os.PathLike) -> TrainingLog:
    """The log history of a finished run of scripts/train_proxy.py or scripts/train_baseline.py, as the plots take it.

    Raises:
        ValueError: if the run is not finished, or a file of it is damaged.
    """
    path = Path(folder, RESULTS_FILE)
    results = read_training_file(path)
    if min(results["steps"], results["episodes"]) < 1:
        raise ValueError(f"{path} has no steps or no episodes: train anew, or leave its folder out.")
    return TrainingLog(Path(folder, "trainer_state.json"), results["episodes"] / results["steps"])


def training_points(log: TrainingLog, key: str) -> np.ndarray:
    """(episodes, seconds of training, value) of every log entry that has a number for `key`, shape (entries, 3); NaN
    for seconds that were not logged. `ValueError` if an entry has something else there."""
    points = []
    for i, entry in enumerate(read_training_file(log.trainer_state)["log_history"]):
        value = entry.get(key)
        if flaw := type_flaw(value, float | None, f"log_history.{i}.{key}"):
            raise ValueError(f"{log.trainer_state} is damaged ({flaw}): leave its folder out.")
        points.append((entry["step"] * log.episodes_per_step, entry.get("train_seconds"), value))
    # A reward function that judged no prompt of a rollout has no mean there: null, or NaN.
    found = np.array(points, dtype=float).reshape(-1, 3)
    return found[~np.isnan(found[:, 2])]


def _reward_keys(log: TrainingLog) -> set[str]:
    """Names under which a log has the mean of each reward function, of rollouts or of evaluations."""
    names = {
        name.removeprefix("eval_") for entry in read_training_file(log.trainer_state)["log_history"] for name in entry
    }
    return {name for name in names if re.fullmatch(r"rewards/.+/mean", name)}


def comparable_keys(runs: dict[str, list[TrainingLog]]) -> dict[str, str]:
    """Keys of the logs by which these runs can be compared, with their labels. For several methods these are the means
    of all reward functions that every method logs, because methods may weigh rewards, or draw kinds of prompts,
    differently. Otherwise it is the reward."""
    shared = sorted(set.intersection(*(_reward_keys(log) for seeds in runs.values() for log in seeds)))
    if len(runs) == 1 or len(shared) < 2:
        return {"reward": "mean reward of the rollouts"}
    return {key: f"mean {key.removeprefix('rewards/').removesuffix('/mean')}" for key in shared}


def running_mean(points: np.ndarray, smooth: int) -> np.ndarray:
    """Mean over the last `smooth` log entries, none in the future, and half of its 95 % interval.

    The interval comes from the spread of the entries in the window (normal approximation), so it includes the noise of
    the batches. It is a little too wide when the reward rises fast.

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
    """[`training_points`] of each key; `ValueError`, naming the first, if the log has none of them."""
    points = [training_points(run, key) for key in keys]
    if not any(map(len, points)):
        rewards = sorted(_reward_keys(run))
        raise ValueError(
            f"{run.trainer_state} logs no {keys[0]!r}{f' but {rewards}' if rewards else ''}: train with it, and "
            "logging_steps below the number of steps."
        )
    return points
