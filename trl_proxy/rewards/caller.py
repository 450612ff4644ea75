"""[`RewardCaller`]: the one way a reward is called, in training, in evaluation and where samples are ranked.

It follows TRL 1.16's convention, so a reward gets the same arguments and gives the same numbers wherever it is used.
"""

import asyncio
import copy
import functools
import inspect
import itertools
import random
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainerState
from trl import is_conversational
from trl.trainer.utils import get_callable_name, is_async_callable, start_event_loop_in_daemon

from ..devices import device_in_use, random_state_of, set_random_state
from .checks import RewardError, check_rewards, check_weights, name_prompt, shorten
from .classifier import ClassifierReward

# What a reward function gets besides the dataset's columns.
HANDED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns of a dataset that TRL hands to no reward.
_NOT_HANDED = ("prompt", "completion")
# The search for the prompt on which a reward fails ends after this many seconds.
_SEARCH_SECONDS = 60.0


class _RewardTimeout(BaseException):
    """Not an `Exception`, so that it also stops a reward function that catches exceptions to retry."""


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raises `_RewardTimeout` inside after this many seconds (None: no limit). It needs the main thread."""
    if seconds is None:
        yield
        return

    def stop(signum, frame):
        raise _RewardTimeout

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Lets a reward draw random numbers without any effect on what is drawn afterwards. Its numbers follow from the
    state before: a resumed run draws the same ones."""
    python, numpy = random.getstate(), np.random.get_state()
    device = device_in_use()
    drawn_from = random_state_of(device)
    seed = int(torch.randint(2**31, ()))
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        set_random_state(device, drawn_from)


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop that all async rewards run on, in a thread of its own: a client keeps its connections between calls."""
    _, loop, ready = start_event_loop_in_daemon(name="RewardCaller")
    ready.wait()
    return loop


async def _outcome(awaitable: Awaitable) -> tuple[Any, BaseException | None]:
    try:
        return await awaitable, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # SystemExit would end the loop, and whoever waits would wait forever
        return None, error


def _wait(future: Future, end: float | None):
    """The result of an async reward, or its error; `_RewardTimeout` if it is not there at the time `end`."""
    try:
        result, error = future.result(None if end is None else max(end - time.monotonic(), 0.0))
    except TimeoutError:  # one that the reward raised would be in `error`
        future.cancel()
        raise _RewardTimeout from None
    if error is not None:
        raise error
    return result


def _ignore(*args) -> None:
    """Takes what a reward logs where there is no trainer to log it."""


class RewardCaller:
    """All rewards of a run, called as TRL 1.16 calls them.

    A reward is a function or any other callable, sync or async, or a sequence classifier with one label. Functions get
    `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`, `log_metric` and the dataset's other
    columns by name. Each call gets copies, so a reward that changes its arguments changes nothing else. Random numbers
    that a reward draws have no effect on others.

    Args:
        rewards: one reward, or a list of them.
        weights: one number for each reward; 1 by default.
        timeout: seconds that a call of a reward may take; None for no limit.
        processing_classes: tokenizers of the classifiers among the rewards, as `reward_processing_classes` of TRL's
            trainers. By default they are loaded by the classifiers' names.
        chat_template_kwargs: for the classifiers' chat templates.

    Attributes:
        functions: the rewards; classifiers are wrapped in [`~trl_proxy.rewards.classifier.ClassifierReward`].
        names: a name for each. Rewards of the same name get a number: `short`, `short_2`.

    Raises:
        ValueError: there is no reward, something cannot be called, the number of weights or tokenizers differs from
            that of the rewards, a classifier has several labels, or a time limit is asked for outside the main thread.
    """

    def __init__(
        self,
        rewards: Callable | list[Callable],
        *,
        weights: list[float] | None = None,
        timeout: float | None = None,
        processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        chat_template_kwargs: dict | None = None,
    ):
        rewards = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
        if not rewards:
            raise ValueError("There is no reward: give at least one function or reward model.")
        tokenizers = processing_classes if isinstance(processing_classes, list) else [processing_classes]
        if processing_classes is None:
            tokenizers = [None] * len(rewards)
        if len(tokenizers) != len(rewards):
            raise ValueError(
                f"`reward_processing_classes` must have one tokenizer (or None) for each of the {len(rewards)} "
                f"rewards, got {len(tokenizers)}."
            )
        in_main_thread = threading.current_thread() is threading.main_thread()
        if timeout is not None and not (in_main_thread and hasattr(signal, "setitimer")):
            raise ValueError(
                f"`reward_timeout` needs the main thread of a system with SIGALRM, got {timeout}: leave "
                "it out, or let the reward functions time out by themselves."
            )
        self.functions = []
        for reward, tokenizer in zip(rewards, tokenizers, strict=True):
            if isinstance(reward, torch.nn.Module):
                reward = ClassifierReward(reward, tokenizer)
            if isinstance(reward, type) or not callable(reward):
                raise ValueError(f"A reward must be a function or a reward model, got {shorten(reward)}.")
            self.functions.append(reward)
        self.classifiers = [reward for reward in self.functions if isinstance(reward, ClassifierReward)]
        for classifier in self.classifiers:
            classifier.chat_template_kwargs = chat_template_kwargs or {}
        self.names: list[str] = []
        for reward in self.functions:
            name = get_callable_name(reward)
            numbered = (f"{name}_{k}" for k in itertools.count(2))
            self.names.append(next(x for x in itertools.chain([name], numbered) if x not in self.names))
        check_weights(weights, self.names)
        self.weights = [1.0] * len(rewards) if weights is None else list(weights)
        self.timeout = timeout

    # Before work starts

    def check(self, column_names: Iterable[str], prompt: str | list[dict] | None = None) -> None:
        """Checks that the rewards can be called on a dataset.

        Args:
            column_names: of the dataset.
            prompt: one of its prompts.

        Raises:
            ValueError: a column has the name of something that a reward function gets anyway, a function does not take
                what it gets, or a classifier's tokenizer has no chat template and the prompts are conversations.
        """
        columns = [name for name in column_names if name not in _NOT_HANDED]
        for function, name in zip(self.functions, self.names, strict=True):
            if isinstance(function, ClassifierReward):
                if prompt is not None:
                    function.check_prompt(prompt)
                continue
            if taken := [column for column in columns if column in HANDED]:
                raise ValueError(
                    f"The dataset has a column `{taken[0]}`, and a reward function gets something else by that name: "
                    "rename the column."
                )
            if misfit := _misfit(function, [*HANDED, *columns]):
                raise ValueError(f"The reward function {name} {misfit}.")

    # Calls

    def each(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: dict[str, list],
        *,
        trainer_state: TrainerState | None = None,
        log_extra: Callable = _ignore,
        log_metric: Callable = _ignore,
    ) -> list[list[float | None]]:
        """Every reward of every response.

        Args:
            prompts, completions: strings or conversations, `n` each.
            completion_ids: token ids of the completions.
            columns: other columns of the dataset, `n` values each.
            trainer_state, log_extra, log_metric: a trainer's. Without a trainer rewards get a new state, and what they
                log is ignored.

        Returns:
            one list of `n` numbers for each reward. With several rewards a number may be None: the reward does not
            apply.

        Raises:
            RewardError: a reward failed, took too long or returned something else, or none applies to a prompt. The
                message names the prompt.
        """
        self.check(columns)
        if not prompts:
            return [[] for _ in self.functions]
        rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        rows |= {name: values for name, values in columns.items() if name not in (*HANDED, *_NOT_HANDED)}
        handed = {"trainer_state": trainer_state or TrainerState(), "log_extra": log_extra, "log_metric": log_metric}
        found: dict[int, list[float | None]] = {}
        running: dict[int, tuple[Future, float | None]] = {}
        # Sync functions come first, then the async ones run at the same time, as in TRL.
        order = sorted(range(len(self.functions)), key=lambda i: is_async_callable(self.functions[i]))
        with _own_random_state(), torch.inference_mode(False), torch.enable_grad():
            try:
                for i in order:
                    with self._failures(i, rows, handed):
                        with _time_limit(self.timeout):
                            result = self.functions[i](**copy.deepcopy(rows), **handed)
                            if not inspect.isawaitable(result):
                                found[i] = self._checked(i, result, prompts)
                                continue
                        end = None if self.timeout is None else time.monotonic() + self.timeout
                        running[i] = asyncio.run_coroutine_threadsafe(_outcome(result), _event_loop()), end
                for i, (future, end) in running.items():
                    with self._failures(i, rows, handed):
                        found[i] = self._checked(i, _wait(future, end), prompts)
            finally:
                for future, _ in running.values():
                    future.cancel()
        values = [found[i] for i in range(len(self.functions))]
        for prompt, *of_prompt in zip(prompts, *values, strict=True):
            if all(value is None for value in of_prompt):
                raise RewardError(
                    f"No reward applies to the prompt {name_prompt(prompt)}: {', '.join(self.names)} returned None."
                )
        return values

    def score(
        self, prompts: list, texts: list[str], completion_ids: list[list[int]], columns: dict[str, list]
    ) -> list[float]:
        """The weighted sum of the rewards of each response, where there is no trainer.

        Args:
            texts: the responses as text, decoded from `completion_ids` without special tokens.
            prompts, completion_ids, columns: as for `each`.

        Raises:
            RewardError: as for `each`.
        """
        conversational = len(prompts) > 0 and is_conversational({"prompt": prompts[0]})
        completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
        values = zip(*self.each(prompts, completions, completion_ids, columns), strict=True)
        return [sum(w * x for w, x in zip(self.weights, row, strict=True) if x is not None) for row in values]

    def _checked(self, i: int, result, prompts: list) -> list[float | None]:
        return check_rewards(result, len(prompts), prompts, self.names[i], allow_none=len(self.functions) > 1)

    # Failures

    @contextmanager
    def _failures(self, i: int, rows: dict[str, list], handed: dict) -> Iterator[None]:
        """Turns what a reward raises into a `RewardError` that names the prompt."""
        try:
            yield
        except RewardError:
            raise
        except (Exception, SystemExit, _RewardTimeout) as error:
            raise RewardError(self._describe(i, error, rows, handed)) from error

    def _describe(self, i: int, error: BaseException, rows: dict[str, list], handed: dict) -> str:
        if isinstance(error, _RewardTimeout):
            happened = f"took longer than reward_timeout={self.timeout} seconds"
        else:
            happened = f"raised {type(error).__name__} ({' '.join(str(error).split())[:500]})"
        prompts = rows["prompts"]
        guilty = self._guilty(i, error, rows, handed["trainer_state"])
        where = "the prompt" if guilty is not None else "a batch whose first prompt is"
        return f"The reward function {self.names[i]} {happened} on {where} {name_prompt(prompts[guilty or 0])}."

    def _guilty(self, i: int, error: BaseException, rows: dict[str, list], trainer_state: TrainerState) -> int | None:
        """Calls the reward prompt by prompt. Returns the place of the first one that fails in the same way, or of the
        one that runs when the time is over; None if there is none."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if isinstance(self.functions[i], ClassifierReward) and distributed:
            return None  # a model that is cut into parts runs on all processes at once
        handed = {"trainer_state": trainer_state, "log_extra": _ignore, "log_metric": _ignore}
        place, end = 0, time.monotonic() + (self.timeout or _SEARCH_SECONDS)
        try:
            with _time_limit(self.timeout):
                for place in range(len(rows["prompts"])):
                    if time.monotonic() > end:
                        return None
                    one = {name: values[place : place + 1] for name, values in rows.items()}
                    result = self.functions[i](**copy.deepcopy(one), **handed)
                    if inspect.isawaitable(result):
                        _wait(asyncio.run_coroutine_threadsafe(_outcome(result), _event_loop()), end)
        except (Exception, SystemExit, _RewardTimeout) as found:
            return place if type(found) in (type(error), _RewardTimeout) else None
        return None


def as_caller(rewards: RewardCaller | Callable | list[Callable]) -> RewardCaller:
    """A caller of the rewards; a caller stays what it is."""
    return rewards if isinstance(rewards, RewardCaller) else RewardCaller(rewards)


def _misfit(function: Callable, names: list[str]) -> str | None:
    """What is wrong with the parameters of a function that gets these names; None if it can be called so, or if its
    parameters are not known."""
    if hasattr(function, "__signature__"):
        return None  # what a decorator says, which need not be true
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # written in C
        return None
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if unknown := [name for name in names if name not in by_name and not takes_all]:
        listed = ", ".join(f"`{name}`" for name in unknown)
        return f"does not take {listed}, which every reward function gets: add `**kwargs` to its parameters"
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if missing := [name for name in required if name not in names]:
        listed, columns = ", ".join(f"`{name}`" for name in missing), ", ".join(names[len(HANDED) :]) or "prompts"
        return f"needs {listed}, and the dataset has only {columns}: add the column, or a default value"
    return None
