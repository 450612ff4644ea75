"""What PPO on the gate and PPO on the LM share, on top of TRL's RLOOTrainer.

RLOOTrainer brings prompts, reward functions, buffering, logging, evaluation and checkpoints. Here a critic takes the
place of its leave-one-out baseline: rewards are kept, advantages are computed over steps (decisions of the gate, or
tokens), and the loss is PPO's. The subclasses say what a step is.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl import RLOOTrainer, is_conversational
from trl.trainer.utils import RepeatSampler, is_async_callable

from .advantages import gae, step_rewards
from .checkpoints import AtomicCheckpoints
from .config import PPOConfig
from .losses import approx_kl, clip_fraction, clipped_policy_loss, clipped_value_loss, masked_mean
from .rewards import as_list, check_rewards


class RewardError(RuntimeError):
    """A reward function raised, or returned something that is no reward. A checkpoint was saved before."""


class _RewardTimeout(BaseException):
    """Not an `Exception`: a reward function that catches those, to ask a server again, is to be stopped too."""


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raises `_RewardTimeout` inside after so many seconds, in the main thread alone; None for no limit."""
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


class _GuardedReward:
    """A reward function whose failure is kept until every process can hear of it."""

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
        """The first prompt on which the function fails, or is when as much time is over again, asked for one at a
        time; None where it fails on none."""
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


class _GuardedAsyncReward(_GuardedReward):
    """The same for a coroutine function."""

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
    """Notices, inside, logits of the LM that are NaN or +inf: tokens drawn from them would be rubbish."""

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


class _EpochSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the epoch alone, so that a resumed run sees the same prompts."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class ActorCriticTrainer(AtomicCheckpoints, RLOOTrainer):
    """PPO's shared core. Subclasses provide `_collect` and `_evaluate_actions`."""

    def __init__(self, model, reward_funcs, args: PPOConfig, train_dataset=None, eval_dataset=None, **kwargs):
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            _check_dataset(name, dataset)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if args.reward_timeout is not None and not (in_main_thread and hasattr(signal, "setitimer")):
            raise ValueError(
                f"`reward_timeout` needs the main thread of a system with SIGALRM, got {args.reward_timeout}: leave "
                "it out, or let the reward functions time out by themselves."
            )
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self._guards: list[_GuardedReward] = []
        for i, func in enumerate(funcs):
            if callable(func) and not isinstance(func, torch.nn.Module):
                guard = _GuardedAsyncReward if is_async_callable(func) else _GuardedReward
                name = getattr(func, "__name__", type(func).__name__)
                # With several reward functions TRL takes None for "does not apply to this sample".
                self._guards.append(guard(func, name, len(funcs) > 1, args.reward_timeout))
                funcs = [*funcs[:i], self._guards[-1], *funcs[i + 1 :]]
        super().__init__(
            model=model,
            reward_funcs=funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        for dataset in (train_dataset, eval_dataset):
            if isinstance(dataset, Dataset):
                check_chat_template(dataset["prompt"][0], self._tokenizer)
        self._watch: _LogitsWatch | None = None

    # What subclasses provide

    def _collect(self, output: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Of the rollout just made: `action_mask` (bool), `action_positions` (tokens written before the action),
        `action_log_probs`, `state_values`, optionally `step_rewards`, all `(B, T)`, and what `_evaluate_actions`
        needs, with B in front."""
        raise NotImplementedError

    def _evaluate_actions(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of the actions and state values, `(B, T)` each, with gradients."""
        raise NotImplementedError

    # Rewards

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._check_logits(prompts)
        self._scores = []
        # The same ends on every process, since rewards are gathered.
        for end in range(self._scored_every(), self.max_completion_length, self._scored_every()):
            ids = [row[:end] for row in completion_ids_list]
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
            if not isinstance(completions[0], str):
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            self._scores.append(self._score(self._sound_rewards(inputs, prompts, texts, ids)))
        # What reward functions log is logged of finished responses.
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        rewards = self._sound_rewards(inputs, prompts, completions, completion_ids_list)
        self._scores.append(self._score(rewards, -self._missing_eos(completion_ids_list)))
        return rewards

    def _check_logits(self, prompts) -> None:
        """`ValueError` on every process where the LM's logits in this rollout were no numbers on one."""
        first = [prompts[0]] if self._watch and self._watch.noticed() else []
        if first := gather_object(first):
            raise ValueError(
                f"The LM's logits are NaN or infinite in the batch whose first prompt is {first[0]!r}: load it in "
                "float32 if it computes in float16, look for damaged weights, or lower the learning rate if it is the "
                "LM that is trained."
            )

    def _missing_eos(self, completion_ids_list: list[list[int]]) -> torch.Tensor:
        """The penalty of each response of all processes, `(all B,)`: of those without end of sequence."""
        ends = (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id)
        cut = [ids[-1] not in ends for ids in completion_ids_list]
        cut = torch.tensor(cut, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.gather(cut) * (self.args.missing_eos_penalty or 0.0)

    def _scored_every(self) -> int:
        """Tokens from one score of a response to the next; evaluation scores finished responses alone."""
        shaping = self.args.reward_shaping_tokens if self.model.training else None
        return shaping or self.max_completion_length

    def _sound_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """RLOO's rewards `(all B, functions)`, None being NaN; `RewardError` on every process where one is unsound."""
        # Random numbers that a reward takes, as one does that loads its model when it is first called, must not change
        # training: a resumed run would see others.
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        errors = [guard.error for guard in self._guards if guard.error]
        start = self.accelerator.process_index * len(prompts)
        local = rewards[start : start + len(prompts)]
        bad = (local.isinf().any(-1) | local.isnan().all(-1)).nonzero()[:, 0].tolist()
        if bad and not errors:
            errors = [f"The rewards {local[bad[0]].tolist()} are not finite on the prompt {prompts[bad[0]]!r}."]
        # Every process stops, not only the one whose reward failed; the others would wait for it for ever.
        errors = gather_object(errors)
        if errors:
            raise RewardError(errors[0])
        return rewards

    def _score(self, rewards: torch.Tensor, extra: torch.Tensor | float = 0.0) -> torch.Tensor:
        """What the episodes earn, `(all B,)`: the weighted sum of their rewards, from the mean of the prompt's other
        responses where there are any (Kool et al. 2019, the leave-one-out baseline of RLOO)."""
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(-1) + extra
        if self.reward_clip_range:
            scores = scores.clamp(*self.reward_clip_range)
        group = self.num_generations if self.model.training else self.num_generations_eval
        if self.args.group_baseline and group > 1:
            grouped = scores.view(-1, group)
            scores = ((grouped - grouped.mean(-1, keepdim=True)) * group / (group - 1)).flatten()
        return scores

    # Rollout -> advantages

    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        rng_state = torch.get_rng_state()
        head = self.accelerator.unwrap_model(self.model_wrapped).get_output_embeddings()
        try:
            with _LogitsWatch(head) as self._watch:
                output = super()._generate_and_score_completions(inputs)
        except RewardError as failure:
            if not training:
                raise
            # The state before this rollout: a resumed run makes the same rollout and asks for its rewards again.
            torch.set_rng_state(rng_state)
            self._save_checkpoint(self.model, trial=None)
            raise RewardError(
                f"{str(failure).removesuffix('.')}: mend it, and the same command goes on from "
                f"checkpoint-{self.state.global_step}, saved just now."
            ) from failure
        except RuntimeError:
            # Sampling has no tokens to draw where the logits are no numbers.
            self._check_logits([row["prompt"] for row in inputs])
            raise
        batch = self._collect(output)
        mask, values = batch["action_mask"], batch["state_values"]
        start = self.accelerator.process_index * len(inputs)
        scores = torch.stack(self._scores, -1)[start : start + len(inputs)].to(values)
        rewards = step_rewards(scores, batch.pop("action_positions"), mask, self._scored_every())
        rewards = rewards + batch.pop("step_rewards", 0.0)
        advantages, returns = gae(rewards, values, mask, self.args.gamma, self.args.gae_lambda)

        # Moments over the steps of all processes, for whitening and for the critic's explained variance.
        error = (returns - values) * mask
        total = self.accelerator.reduce(
            torch.stack(
                [x.double().sum() for x in (mask, advantages, advantages**2, returns, returns**2, error, error**2)]
            ),
            reduction="sum",
        ).tolist()
        n = max(total[0], 1.0)
        mean = total[1] / n
        std = max(total[2] / n - mean**2, 0.0) ** 0.5
        var_returns, var_error = (max(total[i + 1] / n - (total[i] / n) ** 2, 0.0) for i in (3, 5))
        batch["advantages_per_step"] = (advantages - mean) / (std + 1e-8) * mask
        batch["returns"] = returns

        metrics = self._metrics["train" if training else "eval"]
        metrics["explained_variance"].append(1 - var_error / var_returns if var_returns > 0 else 0.0)
        metrics["value/mean"].append((total[3] - total[5]) / n)
        # With a critic, the spread within a group of completions means nothing.
        metrics.pop("frac_reward_zero_std", None)
        # The table of completions shows an episode's mean advantage in place of RLOO's.
        output["advantages"] = advantages.sum(-1) / mask.sum(-1).clamp(min=1)
        shown = self.accelerator.gather(output["advantages"]).tolist()
        for _ in range(min(len(shown), len(self._logs["advantages"]))):
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(shown)
        return {**output, **batch}

    # Loss

    def _compute_loss(self, model, inputs):
        mask, old = inputs["action_mask"], inputs["action_log_probs"]
        log_probs, entropies, values = self._evaluate_actions(model, inputs)
        clip = (self.epsilon_low, self.epsilon_high)
        policy_loss = clipped_policy_loss(log_probs, old, inputs["advantages_per_step"], mask, *clip)
        value_loss = clipped_value_loss(
            values, inputs["state_values"], inputs["returns"], mask, self.args.cliprange_value
        )
        entropy = masked_mean(entropies, mask)
        with torch.no_grad():
            logged = {
                "loss/policy": policy_loss,
                "loss/value": value_loss,
                "entropy": entropy,
                "approx_kl": approx_kl(log_probs, old, mask),
                "clip_ratio": clip_fraction(log_probs, old, mask, *clip),
            }
            values = self.accelerator.reduce(torch.stack([x.detach() for x in logged.values()]), reduction="mean")
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in zip(logged, values.tolist()):
            metrics[name].append(value)
        return policy_loss + self.args.vf_coef * value_loss - self.args.entropy_coef * entropy

    # Data order

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        sampler.__class__ = _EpochSampler
        return sampler


def check_chat_template(prompt: str | list[dict], tokenizer) -> None:
    """`ValueError` where the prompt is a conversation and the tokenizer cannot write one."""
    if is_conversational({"prompt": prompt}) and tokenizer.chat_template is None:
        raise ValueError(
            f"The prompts are conversations and the tokenizer of {tokenizer.name_or_path or 'the LM'} has no chat "
            "template: set `chat_template` in its files, or give the prompts as plain text."
        )


def _check_dataset(name: str, dataset) -> None:
    """`ValueError` for a dataset without rows or without prompts."""
    if dataset is None or isinstance(dataset, dict):
        for key, part in (dataset or {}).items():
            _check_dataset(f"{name}[{key!r}]", part)
        return
    if dataset.column_names is not None and "prompt" not in dataset.column_names:
        raise ValueError(f"`{name}` has no column `prompt`, only {', '.join(dataset.column_names) or 'none'}.")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
