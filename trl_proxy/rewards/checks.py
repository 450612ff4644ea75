"""Checks of the results of reward functions, and their import by path."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Real

import numpy as np
import torch
import trl.rewards

from ..prompts import to_text

# Names that need no path, as in TRL's scripts.
TRL_REWARDS = (
    "accuracy_reward",
    "get_soft_overlong_punishment",
    "reasoning_accuracy_reward",
    "think_format_reward",
)
_LARGEST = torch.finfo(torch.float32).max  # trainers compute with rewards in float32


class RewardError(ValueError):
    """A reward raised, took too long, or returned an invalid value. In training, a checkpoint is saved first."""


def _is_finite(value) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def shorten(value) -> str:
    """The value in one line of at most 200 characters."""
    return " ".join(repr(value).split())[:200]


def name_prompt(prompt) -> str:
    """A plain or conversational prompt in an error message: the user's text in one line, at most 200 characters."""
    try:
        text = to_text(prompt, "user")
    except ValueError:
        text = ""
    return repr(text[:200]) if text else shorten(prompt)


def as_list(rewards, n_expected: int, name: str, where: str = "") -> list:
    """
    The result of a reward function (a list, tuple, generator, array or tensor) as a list.

    Args:
        where (`str`): the end of the error message.

    Raises:
        RewardError: it is something else.
    """
    if isinstance(rewards, torch.Tensor | np.ndarray):
        rewards = rewards.tolist()
    if not isinstance(rewards, Iterable) or isinstance(rewards, str | bytes | Mapping | Set):
        raise RewardError(
            f"The reward function '{name}' returned a {type(rewards).__name__} ({shorten(rewards)}) instead of a list "
            f"of {n_expected} numbers{where}."
        )
    return [value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value for value in rewards]


def check_rewards(
    rewards, n_expected: int, prompts: Sequence, name: str, allow_none: bool = False
) -> list[float | None]:
    """
    The rewards as floats, after a check that there is one finite number per prompt.

    Args:
        rewards: what the reward function returned, `n_expected` numbers.
        prompts (`Sequence`): the prompts, plain or conversational, for the error message.
        name (`str`): the reward function's name, for the error message.
        allow_none (`bool`): whether a reward may be None, TRL's "does not apply".

    Raises:
        RewardError: no list, the wrong length, or a reward that is None, NaN, infinite, not a number, or too large for
            float32.
    """
    where = f", for a batch whose first prompt is {name_prompt(prompts[0])}" if len(prompts) else ""
    values = as_list(rewards, n_expected, name, where)
    if len(values) != n_expected:
        raise RewardError(
            f"The reward function '{name}' returned {len(values)} rewards, but {n_expected} were expected{where}."
        )
    for value, prompt in zip(values, prompts, strict=True):
        if value is None and allow_none:
            continue
        if not _is_finite(value):
            instead, remedy = "a finite number", ""
            if value is None:
                remedy = " (None means that a reward does not apply, and there is no other one)"
        elif abs(value) > _LARGEST:
            instead, remedy = "a number that float32 can hold", " (scale it down)"
        else:
            continue
        raise RewardError(
            f"The reward function '{name}' returned {shorten(value)} instead of {instead}, for the prompt "
            f"{name_prompt(prompt)}{remedy}."
        )
    return [None if value is None else float(value) for value in values]


def check_weights(weights: Sequence[float] | None, names: Sequence[str]) -> None:
    """`ValueError` if there is not one weight for each reward."""
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"`reward_weights` has {len(weights)} weights for {len(names)} rewards ({', '.join(names)}): give one for "
            "each."
        )


def import_reward(path: str) -> Callable:
    """
    The callable at `path`, written "package.module.function". It may be in the working directory, as in TRL, and an
    attribute of an object in a module. The names of TRL's own rewards need no path.

    Raises:
        ValueError: no such module or function, the module fails while it is imported, or what is found is a class or
            cannot be called.
    """
    if path == "get_soft_overlong_punishment":
        return trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)  # TRL's values
    if path in TRL_REWARDS:
        return getattr(trl.rewards, path)
    parts = path.split(".")
    if len(parts) < 2 or not all(parts):
        raise ValueError(f"A reward function is given as 'package.module.function', got '{path}'.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    failed = f"The reward function '{path}' cannot be imported:"
    missing: ModuleNotFoundError | None = None
    for n in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:n])
        try:
            found = importlib.import_module(module_name)
            break
        except (Exception, SystemExit) as error:
            # If the module is there and one of its own imports is missing, that is the error to tell.
            if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
                missing = missing or error
                continue
            happened = f"raised {type(error).__name__} ({' '.join(str(error).split())})"
            raise ValueError(f"{failed} the module {module_name} {happened}.") from error
    else:
        raise ValueError(f"{failed} {missing}.") from missing
    for part in parts[n:]:
        if not hasattr(found, part):
            if missing and part == parts[n] and n + 1 < len(parts):
                raise ValueError(f"{failed} {missing}.") from missing
            raise ValueError(f"The module '{module_name}' has no function '{'.'.join(parts[n:])}' to use as a reward.")
        found = getattr(found, part)
    if isinstance(found, type):
        raise ValueError(f"The reward function '{path}' is a class: name a function, or an object that can be called.")
    if not callable(found):
        raise ValueError(f"The module '{module_name}' has no function '{'.'.join(parts[n:])}' to use as a reward.")
    return found
