"""The shared base of PPO on the gate and PPO on the LM, on top of TRL's RLOOTrainer.

RLOOTrainer handles prompts, reward functions, buffering, logging, evaluation and checkpoints. Here a critic replaces
its leave-one-out baseline. Advantages are computed over steps, and the loss is PPO's. The subclasses define a step: a
decision of the gate, or a token.

Comments mark the places where RLHF breaks, with the same number in all files: (1) forced last candidate, (2) decision
mask, (3) EOS, (4) shaping, (5) whitening over processes, (6) ratio under replay, (7) sign of the KL.
"""

from typing import Any

import torch
from trl import RLOOTrainer
from trl.trainer.utils import RepeatSampler

from ..devices import warn_of_emulation
from .advantages import gae, step_rewards
from .config import PPOConfig
from .decoding import DecodingMixin
from .losses import approx_kl, clip_fraction, clipped_policy_loss, clipped_value_loss, masked_mean
from .prompt_checks import PromptCheckMixin
from .reward_guards import RewardGuardMixin


class _EpochSampler(RepeatSampler):
    """TRL's sampler. Its order depends only on the epoch, so a resumed run sees the same prompts."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class ActorCriticTrainer(PromptCheckMixin, DecodingMixin, RewardGuardMixin, RLOOTrainer):
    """PPO's shared core. Subclasses provide `_collect` and `_evaluate_actions`."""

    def __init__(self, model, reward_funcs, args: PPOConfig, **kwargs):
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        warn_of_emulation(self.model.get_input_embeddings().weight.dtype, self.accelerator.device)

    # What subclasses provide

    def _collect(self, output: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Tensors of the latest rollout, `(B, T)` each: `action_mask` (bool), `action_positions` (tokens written
        before the action), `action_log_probs`, `state_values` and optionally `step_rewards`. It also returns the
        inputs of `_evaluate_actions`, with B as the first dimension."""
        raise NotImplementedError

    def _evaluate_actions(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of the actions and state values, `(B, T)` each, with gradients."""
        raise NotImplementedError

    # Rewards

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._scores = []
        # All processes use the same ends, because rewards are gathered.
        for end in range(self._scored_every(), self.max_completion_length, self._scored_every()):
            ids = [row[:end] for row in completion_ids_list]
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
            if not isinstance(completions[0], str):
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            self._scores.append(self._score(super()._calculate_rewards(inputs, prompts, texts, ids)))
        # Only the logs for finished responses are kept.
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scores.append(self._score(rewards, -self._missing_eos()))
        return rewards

    def _missing_eos(self) -> torch.Tensor:
        """The penalty of each response of all processes, `(all B,)`: 0 if it has an end."""
        # (3) EOS: a response ends with an EOS id or a stop string, or it was cut off.
        cut = [0.0 if ended else 1.0 for ended in self._ended]
        return self.accelerator.gather(torch.tensor(cut, device=self.accelerator.device)) * (
            self.args.missing_eos_penalty or 0.0
        )

    def _scored_every(self) -> int:
        """Tokens between two scores of a response. Evaluation scores only finished responses."""
        shaping = self.args.reward_shaping_tokens if self.model.training else None
        return shaping or self.max_completion_length

    def _score(self, rewards: torch.Tensor, extra: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The score of each episode, `(all B,)`: the weighted sum of its rewards. With a group baseline, the mean
        score of the prompt's other responses is subtracted (Kool et al. 2019, the leave-one-out baseline of RLOO)."""
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
        output = super()._generate_and_score_completions(inputs)
        batch = self._collect(output)
        mask, values = batch["action_mask"], batch["state_values"]
        start = self.accelerator.process_index * len(inputs)
        scores = torch.stack(self._scores, -1)[start : start + len(inputs)].to(values)
        # (4) Shaping: each change of the score is paid to the decision that caused it. The changes sum to the finished
        # response's score.
        rewards = step_rewards(scores, batch.pop("action_positions"), mask, self._scored_every())
        rewards = rewards + batch.pop("step_rewards", 0.0)
        # (2) Decision mask: padding earns nothing, carries no value, and passes none on.
        advantages, returns = gae(rewards, values, mask, self.args.gamma, self.args.gae_lambda)

        # (5) Whitening over processes: each has a part of the rollout, and all must use the same moments. The moments
        # also give the critic's explained variance.
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

        explained = 1 - var_error / var_returns if var_returns > 0 else 0.0
        metrics = self._log_scalars({"explained_variance": explained, "value/mean": (total[3] - total[5]) / n})
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
        # (6) Ratio under replay: `old` is from the policy that made the rollout, however many updates ago.
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
        self._log_scalars(dict(zip(logged, values.tolist())))
        return policy_loss + self.args.vf_coef * value_loss - self.args.entropy_coef * entropy

    def _log_scalars(self, values: dict[str, float]) -> dict[str, list[float]]:
        """Adds values to the training or evaluation metrics that the next log line averages; returns all of them."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in values.items():
            metrics[name].append(value)
        return metrics

    # Data order

    def _get_train_sampler(self, dataset=None):
        return _EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )
