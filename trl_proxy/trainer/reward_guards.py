"""Guards that stop a run of TRL's online trainers if a reward function fails or the LM's logits are not finite.

List [`RewardGuardMixin`] before RLOOTrainer or GRPOTrainer among the parents. The run then ends on every process, not
only on the one whose reward failed. The error names the prompt in one sentence. The run can resume from a checkpoint.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from trl.trainer.utils import is_async_callable

from ..rewards.checks import as_list, check_rewards
from .checkpoints import AtomicCheckpointMixin
from .metrics import RowMetricsMixin


class RewardError(RuntimeError):
    """A reward function raised, or returned an invalid reward. In training, a checkpoint is saved first."""


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
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class GuardedReward:
    """A reward function whose failure is stored until all processes can stop together."""

    def __init__(self, function: Callable, name: str, allow_none: bool, timeout: float | None):
        self.function, self.__name__, self.allow_none, self.timeout = function, name, allow_none, timeout
        self.error: str | None = None

    def __call__(self, prompts, completions, **columns):
        try:
            with _time_limit(self.timeout):
                rewards = as_list(
                    self.function(prompts=prompts, completions=completions, **columns), len(prompts), self.__name__
                )
            return self._check(rewards, prompts)
        except (Exception, SystemExit, _RewardTimeout) as error:
            self.error = self._describe(error, prompts, lambda: self._guilty(prompts, completions, columns))
            return [0.0] * len(prompts)

    def _check(self, rewards: list, prompts) -> list[float | None]:
        given = [0.0 if reward is None and self.allow_none else reward for reward in rewards]
        check_rewards(given, len(prompts), prompts, self.__name__)
        return rewards

    def _guilty(self, prompts, completions, columns) -> Any | None:
        """Calls the function prompt by prompt. Returns the first prompt that fails, or the one that runs when the time
        limit expires again; None if none fails."""
        prompt = None
        try:
            with _time_limit(self.timeout):
                for i, prompt in enumerate(prompts):
                    one = {
                        k: v[i : i + 1] if isinstance(v, list) and len(v) == len(prompts) else v
                        for k, v in columns.items()
                    }
                    self.function(prompts=[prompt], completions=completions[i : i + 1], **one)
        except (Exception, SystemExit, _RewardTimeout):
            return prompt
        return None

    def _describe(self, error: BaseException, prompts, find_guilty: Callable) -> str:
        if isinstance(error, ValueError) and f"'{self.__name__}' returned" in str(error):
            return str(error)
        if isinstance(error, _RewardTimeout):
            happened = f"took longer than reward_timeout={self.timeout} seconds"
        else:
            happened = f"raised {type(error).__name__} ({' '.join(str(error).split())})"
        guilty = find_guilty()
        where = f"the prompt {guilty!r}" if guilty is not None else f"a batch whose first prompt is {prompts[0]!r}"
        return f"The reward function {self.__name__} {happened} on {where}."


class GuardedAsyncReward(GuardedReward):
    """[`GuardedReward`] for a coroutine function."""

    async def __call__(self, prompts, completions, **columns):
        limit = asyncio.timeout(self.timeout)
        try:
            async with limit:
                rewards = await self.function(prompts=prompts, completions=completions, **columns)
            return self._check(as_list(rewards, len(prompts), self.__name__), prompts)
        except Exception as error:
            self.error = self._describe(_RewardTimeout() if limit.expired() else error, prompts, lambda: None)
            return [0.0] * len(prompts)


class _LogitsWatch:
    """Notices NaN or +inf in the LM's logits; tokens drawn from such logits are meaningless."""

    def __init__(self, head: torch.nn.Module):
        self.head = head
        self.largest: list[torch.Tensor] = []

    def __enter__(self):
        self.hook = self.head.register_forward_hook(self._look)
        return self

    def _look(self, module, args, logits: torch.Tensor) -> None:
        if logits.numel():
            self.largest.append(logits.amax())

    def __exit__(self, *exception):
        self.hook.remove()

    def noticed(self) -> bool:
        return not all(largest < torch.inf for largest in self.largest)


class RewardGuardMixin(RowMetricsMixin, AtomicCheckpointMixin):
    """A mixin to list before TRL's RLOOTrainer or GRPOTrainer. `args.reward_timeout`, if it exists, limits each call
    of a reward function, in seconds."""

    def __init__(self, model, reward_funcs, args=None, **kwargs):
        timeout = getattr(args, "reward_timeout", None)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if timeout is not None and not (in_main_thread and hasattr(signal, "setitimer")):
            raise ValueError(
                f"`reward_timeout` needs the main thread of a system with SIGALRM, got {timeout}: leave "
                "it out, or let the reward functions time out by themselves."
            )
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self._guards: list[GuardedReward] = []
        for i, func in enumerate(funcs):
            if callable(func) and not isinstance(func, torch.nn.Module):
                guard = GuardedAsyncReward if is_async_callable(func) else GuardedReward
                name = getattr(func, "__name__", type(func).__name__)
                # With several reward functions TRL takes None for "does not apply to this sample".
                self._guards.append(guard(func, name, len(funcs) > 1, timeout))
                funcs = [*funcs[:i], self._guards[-1], *funcs[i + 1 :]]
        self._watch: _LogitsWatch | None = None
        super().__init__(model=model, reward_funcs=funcs, args=args, **kwargs)  # type: ignore[call-arg]

    def _check_logits(self, prompts) -> None:
        """`ValueError` on every process if the LM's logits in this rollout were not finite on any process. Only the
        first call for a rollout checks them."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        if first := gather_object([prompts[0]] if watch.noticed() else []):
            raise ValueError(
                f"The LM's logits are NaN or infinite in the batch whose first prompt is {first[0]!r}: load it in "
                "float32 if it computes in float16, look for damaged weights, or lower the learning rate if the LM is "
                "trained."
            )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """TRL's rewards `(all B, functions)`, NaN for None; `RewardError` on every process if one is invalid."""
        self._check_logits(prompts)
        # A reward may draw random numbers, for example when its first call loads a model. They must not change
        # training: a resumed run would draw others.
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        errors = [guard.error for guard in self._guards if guard.error]
        start = self.accelerator.process_index * len(prompts)
        local = rewards[start : start + len(prompts)]
        bad = (local.isinf().any(-1) | local.isnan().all(-1)).nonzero()[:, 0].tolist()
        if bad and not errors:
            errors = [f"The rewards {local[bad[0]].tolist()} are not finite on the prompt {prompts[bad[0]]!r}."]
        # All processes stop, not only the one whose reward failed: the others would wait for it forever.
        errors = gather_object(errors)
        if errors:
            raise RewardError(errors[0])
        return rewards

    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        rng_state = torch.get_rng_state()
        head = self.accelerator.unwrap_model(self.model_wrapped).get_output_embeddings()
        try:
            with _LogitsWatch(head) as self._watch:
                return super()._generate_and_score_completions(inputs)
        except RewardError as failure:
            if not training:
                raise
            # Restore the state before this rollout: a resumed run makes the same rollout and scores it again.
            torch.set_rng_state(rng_state)
            self._save_checkpoint(self.model, trial=None)
            raise RewardError(
                f"{str(failure).removesuffix('.')}: fix it, and the same command resumes from "
                f"checkpoint-{self.state.global_step}, saved just now."
            ) from failure
        except RuntimeError:
            # Sampling also fails if the logits are not finite.
            self._check_logits([row["prompt"] for row in inputs])
            raise
