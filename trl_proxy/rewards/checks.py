"""Checks of the results of reward functions, and their import by path."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Real

import numpy as np
import torch

from ..prompts import to_text


def _is_finite(value) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _short(value) -> str:
    """The value in one line of at most 200 characters."""
    return " ".join(repr(value).split())[:200]


def as_list(rewards, n_expected: int, name: str) -> list:
    """
    The result of a reward function (a list, tuple, generator, array or tensor) as a list.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(rewards, torch.Tensor | np.ndarray):
        rewards = rewards.tolist()
    if not isinstance(rewards, Iterable) or isinstance(rewards, str | bytes | Mapping | Set):
        raise ValueError(
            f"The reward function '{name}' returned a {type(rewards).__name__} ({_short(rewards)}) instead of a list "
            f"of {n_expected} numbers."
        )
    return [value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value for value in rewards]


def check_rewards(rewards: Sequence, n_expected: int, prompts: Sequence, name: str) -> list[float]:
    """
    The rewards as floats, after a check that there is one finite number per prompt.

    Args:
        rewards (`Sequence`): what the reward function returned, `n_expected` numbers.
        prompts (`Sequence`): the prompts, plain or conversational, for the error message.
        name (`str`): the reward function's name, for the error message.

    Raises:
        ValueError: no list, the wrong length, or a reward that is None, NaN, infinite or not a number.
    """
    values = as_list(rewards, n_expected, name)
    if len(values) != n_expected:
        raise ValueError(
            f"The reward function '{name}' returned {len(values)} rewards, but {n_expected} were expected."
        )
    for value, prompt in zip(values, prompts, strict=True):
        if not _is_finite(value):
            raise ValueError(
                f"The reward function '{name}' returned {_short(value)} instead of a finite number, for the "
                f"prompt {to_text(prompt, 'user')[:200]!r}."
            )
    return [float(value) for value in values]


def import_reward(path: str) -> Callable:
    """
    The callable at `path`, written "package.module.function". It may be in the working directory, as in TRL.

    Raises:
        ValueError: no such module, no such function, or it is not callable.
    """
    module_name, _, function_name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"A reward function is given as 'package.module.function', got '{path}'.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"The reward function '{path}' cannot be imported: {error}.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"The module '{module_name}' has no function '{function_name}' to use as a reward.")
    return function
