"""Tests of `trl_proxy.rewards.caller`: what rewards get, what they may return, and what is said if they fail."""

import asyncio
import contextlib
import functools
import random
import time

import numpy as np
import pytest
import torch
from transformers import TrainerState

from trl_proxy.rewards import caller as module
from trl_proxy.rewards.caller import RewardCaller, as_caller
from trl_proxy.rewards.checks import RewardError

PROMPTS, TEXTS, IDS = ["a", "b", "c"], ["xx", "y", "zzz"], [[5, 5, 2], [6, 2], [7, 7, 7]]


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def score(rewards, columns=None, **settings):
    return RewardCaller(rewards, **settings).score(PROMPTS, TEXTS, IDS, columns or {})


# --- several rewards ---


def test_a_weighted_sum_leaves_out_what_does_not_apply():
    def some(prompts, **kwargs):
        return [None, 10.0, 0.0]

    assert score([length, some], weights=[1.0, 0.5]) == [2.0, 6.0, 3.0]
    assert RewardCaller([length, some]).each(PROMPTS, TEXTS, IDS, {})[1] == [None, 10.0, 0.0]


@pytest.mark.fault
def test_a_prompt_that_no_reward_applies_to():
    def some(prompts, **kwargs):
        return [1.0, None, 1.0]

    with pytest.raises(RewardError, match=r"^No reward applies to the prompt 'b': some, some_2 returned None\.$"):
        score([some, some])
    with pytest.raises(
        RewardError, match=r"returned None instead of a finite number, for the prompt 'b' \(None means"
    ):
        score(some)


@pytest.mark.fault
@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0]])
def test_there_is_one_weight_for_each_reward(weights):
    with pytest.raises(ValueError, match=r"`reward_weights` has \d weights for 2 rewards \(length, max\): give one"):
        RewardCaller([length, max], weights=weights)


def test_rewards_of_the_same_name_are_told_apart():
    def length_2(**kwargs):
        return None

    assert RewardCaller([length, length_2, length, functools.partial(length)]).names == [
        "length",
        "length_2",
        "length_3",
        "length_4",
    ]


def test_async_rewards_run_at_the_same_time_and_keep_their_places():
    async def slow(completions, **kwargs):
        await asyncio.sleep(0.3)
        return length(completions)

    async def slower(completions, **kwargs):
        await asyncio.sleep(0.35)
        return [10.0] * len(completions)

    begun = time.monotonic()
    found = RewardCaller([slow, length, slower]).each(PROMPTS, TEXTS, IDS, {})
    assert time.monotonic() - begun < 0.6
    assert found == [[2.0, 1.0, 3.0], [2.0, 1.0, 3.0], [10.0, 10.0, 10.0]]


def test_all_calls_of_async_rewards_share_a_loop():
    """A client that was made in one call is still open in the next."""
    loops = []

    async def reward(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return length(completions)

    score(reward)
    score(reward)
    assert loops[0] is loops[1]


def test_a_sync_function_may_return_a_coroutine():
    async def later(completions):
        return length(completions)

    assert score(lambda completions, **kwargs: later(completions)) == [2.0, 1.0, 3.0]


def test_a_running_event_loop_is_no_obstacle():
    """As in a notebook."""

    async def reward(completions, **kwargs):
        return length(completions)

    async def cell():
        return score(reward)

    assert asyncio.run(cell()) == [2.0, 1.0, 3.0]


def test_a_caller_stays_what_it_is():
    caller = RewardCaller(length)
    assert as_caller(caller) is caller
    assert as_caller(length).names == ["length"]


def test_no_prompts_have_no_rewards():
    assert RewardCaller([length, length]).each([], [], [], {}) == [[], []]


# --- arguments ---


def test_what_there_is_without_a_trainer():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        kwargs["log_extra"]("column", [1, 2, 3])
        kwargs["log_metric"]("metric", 0.5)
        return [0.0] * 3

    score(reward, {"kind": ["u", "v", "w"], "completion": ["no"] * 3})
    state = seen.pop("trainer_state")
    assert isinstance(state, TrainerState)
    assert state.global_step == 0
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen == {"prompts": PROMPTS, "completions": TEXTS, "completion_ids": IDS, "kind": ["u", "v", "w"]}


def test_a_reward_that_changes_its_arguments_changes_nothing_else():
    conversation = [[{"role": "user", "content": "hi"}] for _ in range(3)]
    columns = {"facts": [["one"], ["two"], ["three"]]}
    seen = []

    def destroy(prompts, completions, completion_ids, facts, **kwargs):
        seen.append((prompts[0][0]["content"], completions[0][0]["content"], completion_ids[0], facts[0][:]))
        for row in (prompts, completions, facts):
            row[0].pop()
        completion_ids[1].clear()
        prompts[1][0]["content"] = "gone"
        prompts.pop()
        return [0.0] * 3

    ids = [list(row) for row in IDS]
    RewardCaller([destroy, destroy]).score(conversation, list(TEXTS), ids, columns)
    assert seen == [("hi", "xx", [5, 5, 2], ["one"])] * 2
    assert conversation == [[{"role": "user", "content": "hi"}]] * 3
    assert ids == IDS
    assert columns == {"facts": [["one"], ["two"], ["three"]]}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_random_numbers_of_a_reward_change_none_of_others(kind):
    def reward(prompts, **kwargs):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return torch.rand(len(prompts))

    async def later(prompts, **kwargs):
        return reward(prompts)

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    score(reward if kind == "sync" else later)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
@pytest.mark.parametrize("in_use", [True, False])
def test_random_numbers_of_a_reward_change_none_of_the_accelerators(monkeypatch, kind, in_use):
    """Without one, a generator of the CPU stands for its own. A device that is not in use is left alone."""
    module, generator = getattr(torch, kind), torch.Generator()
    in_use = in_use or kind == "mps"  # which is always ready
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(module, "is_initialized", lambda: in_use, raising=kind != "mps")
    monkeypatch.setattr(module, "get_rng_state", lambda device: in_use and generator.get_state())
    monkeypatch.setattr(module, "set_rng_state", lambda state, device: generator.set_state(state))
    before = generator.get_state()
    score(lambda prompts, **kwargs: torch.rand(len(prompts), generator=generator))
    assert torch.equal(generator.get_state(), before) == in_use


def test_random_numbers_of_a_reward_follow_the_seed():
    """Of every generator, and they are new ones after others have drawn."""

    def reward(prompts, **kwargs):
        return [random.random(), float(np.random.rand()), torch.rand(()).item()]

    def draw(seed):
        torch.manual_seed(seed)
        first = score(reward)
        torch.rand(1)
        return [*first, *score(reward)]

    assert draw(0) == draw(0)
    assert len(set(draw(0)) | set(draw(1))) == 12


def test_a_reward_may_take_gradients_wherever_it_is_called():
    def reward(prompts, **kwargs):
        x = torch.ones(3, requires_grad=True)
        (x**2).sum().backward()
        return x.grad

    with torch.inference_mode():
        assert score(reward) == [2.0] * 3


# --- before work starts ---


@pytest.mark.fault
@pytest.mark.parametrize(
    "column", ["prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"]
)
def test_a_column_with_a_taken_name_is_refused(column):
    caller = RewardCaller(length)
    message = f"^The dataset has a column `{column}`, and a reward function gets something else by that name: rename"
    with pytest.raises(ValueError, match=message):
        caller.check(["prompt", column])
    with pytest.raises(ValueError, match=message):
        caller.score(PROMPTS, TEXTS, IDS, {column: [1, 2, 3]})
    caller.check(["prompt", "completion", "kind"])


class Method:
    def reward(self, prompts, completions):
        return [0.0] * len(prompts)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda prompts, completions: [0.0] * 3,
            "does not take `completion_ids`, `trainer_state`, `log_extra`, `log_metric`, `kind`, which every reward "
            "function gets: add `**kwargs`",
        ),
        (Method().reward, "does not take `completion_ids`"),
        (functools.partial(lambda prompts, **kwargs: [0.0] * 3, "me"), "raised TypeError"),
        (lambda completions, answer, **kwargs: [0.0] * 3, "needs `answer`, and the dataset has only kind: add the"),
        (lambda *, solution, **kwargs: [0.0] * 3, "needs `solution`, and the dataset has only kind: add the column"),
    ],
)
def test_a_function_that_does_not_take_what_it_gets(reward, message):
    with pytest.raises(ValueError, match=r"^The reward function ") as error:
        score(reward, {"kind": [1, 2, 3]})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_stricter_than_a_call():
    """A decorator that hands on only some arguments, parameters that are all named, and what has no signature."""

    @functools.wraps(Method.reward)
    def decorated(**kwargs):
        return Method().reward(kwargs["prompts"], kwargs["completions"])

    def named(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, kind, more=None):
        return [1.0] * 3

    assert score([decorated, named], {"kind": [1, 2, 3]}) == [1.0] * 3


@pytest.mark.fault
@pytest.mark.parametrize("reward", [None, "org/model", 3, Method])
def test_what_is_no_reward(reward):
    with pytest.raises(ValueError, match=r"^A reward must be a function or a reward model, got "):
        RewardCaller(reward)


@pytest.mark.fault
def test_no_reward_at_all():
    with pytest.raises(ValueError, match="There is no reward"):
        RewardCaller([])


@pytest.mark.fault
def test_there_is_one_tokenizer_for_each_reward(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"one tokenizer \(or None\) for each of the 2 rewards, got 1"):
        RewardCaller([length, length], processing_classes=[tiny_tokenizer])


# --- failures ---


@pytest.mark.fault
def test_the_prompt_is_searched_for_within_a_time(monkeypatch):
    """A reward that raises late on all prompts is not called for each of them."""
    calls = []

    def reward(prompts, **kwargs):
        calls.append(len(prompts))
        time.sleep(0.05)
        if len(prompts) > 1:
            raise OSError("gone")
        return [0.0]

    monkeypatch.setattr(module, "_SEARCH_SECONDS", 0.08)
    with pytest.raises(RewardError, match=r"reward raised OSError \(gone\) on a batch whose first prompt is 'p0'"):
        RewardCaller(reward).score([f"p{i}" for i in range(50)], [""] * 50, [[2]] * 50, {})
    assert 2 <= len(calls) <= 4


@pytest.mark.fault
def test_another_error_in_the_search_blames_no_prompt():
    def reward(prompts, **kwargs):
        if len(prompts) == 1:
            raise ZeroDivisionError("one is not enough")
        raise OSError("gone")

    with pytest.raises(RewardError, match=r"raised OSError \(gone\) on a batch whose first prompt is 'a'\.$"):
        score(reward)


@pytest.mark.fault
def test_nothing_is_logged_twice_by_the_search():
    logged = []

    def reward(prompts, log_metric, **kwargs):
        log_metric("calls", len(prompts))
        raise OSError("gone")

    with pytest.raises(RewardError):
        RewardCaller(reward).each(PROMPTS, TEXTS, IDS, {}, log_metric=lambda *args: logged.append(args))
    assert logged == [("calls", 3)]


@pytest.mark.fault
@pytest.mark.parametrize("error", [SystemExit("bye"), KeyError("k"), asyncio.CancelledError(), TimeoutError("slow")])
def test_an_async_reward_that_raises_does_not_hang(error):
    async def reward(prompts, **kwargs):
        if "b" in prompts:
            raise error
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match=rf"^The reward function reward raised {type(error).__name__} .*prompt 'b'"):
        score(reward)
    assert score(length) == [2.0, 1.0, 3.0]

    async def fine(completions, **kwargs):
        return length(completions)

    assert score(fine) == [2.0, 1.0, 3.0]


@pytest.mark.fault
def test_a_time_limit_holds_for_async_rewards_that_block_or_catch_everything():
    async def blocks(prompts, **kwargs):
        time.sleep(0.5)
        return [0.0] * len(prompts)

    async def catches(prompts, **kwargs):
        for _ in range(3):
            with contextlib.suppress(BaseException):
                await asyncio.sleep(0.3)
        return [0.0] * len(prompts)

    for reward in (blocks, catches):
        begun = time.monotonic()
        with pytest.raises(RewardError, match=r"took longer than reward_timeout=0.1 seconds on the prompt 'a'"):
            score(reward, timeout=0.1)
        assert time.monotonic() - begun < 0.5


@pytest.mark.fault
def test_a_failure_is_forgotten_in_the_next_call():
    broken = [True]

    def reward(prompts, **kwargs):
        if broken[0]:
            raise OSError("gone")
        return [1.0] * len(prompts)

    caller = RewardCaller(reward)
    with pytest.raises(RewardError):
        caller.score(PROMPTS, TEXTS, IDS, {})
    broken[0] = False
    assert caller.score(PROMPTS, TEXTS, IDS, {}) == [1.0] * 3


@pytest.mark.fault
def test_a_long_error_and_an_odd_prompt_fit_in_one_line():
    def reward(prompts, **kwargs):
        raise RuntimeError("many\nlines " * 1000)

    prompts = [[{"role": "system", "content": "only\nthis " * 100}]]
    with pytest.raises(RewardError) as error:
        RewardCaller(reward).score(prompts, ["x"], [[2]], {})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 900
