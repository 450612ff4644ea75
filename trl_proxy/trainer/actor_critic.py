"""The shared base of PPO on the gate and PPO on the LM, on top of TRL's RLOOTrainer.

RLOOTrainer handles prompts, reward functions, buffering, logging, evaluation and checkpoints. Here a critic replaces
its leave-one-out baseline. Advantages are computed over steps, and the loss is PPO's. The subclasses define a step: a
decision of the gate, or a token.

Comments mark the places where RLHF breaks, with the same number in all files: (1) forced last candidate, (2) decision
mask, (3) EOS, (4) shaping, (5) whitening over processes, (6) ratio under replay, (7) sign of the KL.
"""

import inspect
from typing import Any

import torch
from transformers import ProcessorMixin
from trl import RLOOTrainer

from ..devices import exact_dtype, warn_of_emulation
from .advantages import gae, step_rewards
from .config import PPOConfig
from .decoding import DecodingMixin
from .losses import approx_kl, clip_fraction, clipped_policy_loss, clipped_value_loss, masked_mean
from .prompt_checks import PromptCheckMixin
from .reward_guards import RewardGuardMixin

# Moments from which the critic's explained variance is computed.
_RETURN, _RETURN_SQUARED, _ERROR, _ERROR_SQUARED = "return", "return squared", "error", "error squared"


class ActorCriticTrainer(PromptCheckMixin, DecodingMixin, RewardGuardMixin, RLOOTrainer):
    """PPO's shared core. Subclasses provide `_collect` and `_evaluate_actions`.

    The loss of an optimizer update is a mean over all its steps, those of all processes and of all micro-batches of
    the gradient accumulation.
    """

    # `_compute_loss` returns a micro-batch's share of the update's loss: transformers must not divide it again.
    loss_is_scaled_for_ga = True
    # Arguments that the trainer cannot have -> the rest of a sentence.
    _refused_arguments: dict[str, str] = {}

    def __init__(self, model, reward_funcs, args: PPOConfig, **kwargs):
        for name, value in list(kwargs.items()):
            known = name in inspect.signature(RLOOTrainer.__init__).parameters
            if not known or (value is not None and name in self._refused_arguments):
                why = self._refused_arguments.get(name, "it takes those of RLOOTrainer")
                raise ValueError(f"{type(self).__name__} takes no `{name}`: {why}.")
        _refuse_processor(kwargs.get("processing_class"))
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        _refuse_processor(self.processing_class)  # TRL may have loaded it
        warn_of_emulation(self.model.get_input_embeddings().weight.dtype, self.accelerator.device)
        self._counted: list[dict] | None = None  # the micro-batches of a rollout, as TRL buffers them
        self._counts: list[int] = []  # the steps of each, of all processes

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
        values = batch["state_values"]
        # A response that was cut off, with `mask_truncated_completions`, has nothing to learn from; nor has a row that
        # only fills the last batch of an evaluation.
        mask = batch["action_mask"] = batch["action_mask"] & output["completion_mask"].any(-1, keepdim=True)
        if self._is_real is not None:
            mask = batch["action_mask"] = mask & self._is_real[:, None]
        start = self.accelerator.process_index * len(inputs)
        scores = torch.stack(self._scores, -1)[start : start + len(inputs)].to(values)
        # (4) Shaping: each change of the score is paid to the decision that caused it. The changes sum to the finished
        # response's score.
        rewards = step_rewards(scores, batch.pop("action_positions"), mask, self._scored_every())
        rewards = rewards + batch.pop("step_rewards", 0.0)
        # (2) Decision mask: padding earns nothing, carries no value, and passes none on.
        advantages, returns = gae(rewards, values, mask, self.args.gamma, self.args.gae_lambda)

        error = (returns - values) * mask
        of_value = {"value/mean": values * mask, _RETURN: returns, _RETURN_SQUARED: returns**2}
        of_value |= {_ERROR: error, _ERROR_SQUARED: error**2}
        self._add_ratios({name: (x.sum(-1), mask.sum(-1)) for name, x in of_value.items()})
        if self.args.normalize_advantages:
            batch["advantages_per_step"] = self._whitened(advantages, mask)
        else:
            batch["advantages_per_step"] = advantages
        batch["returns"] = returns
        # With a critic, the spread within a group of completions means nothing.
        self._metrics[self._mode].pop("frac_reward_zero_std", None)
        # The table of completions shows an episode's mean advantage in place of RLOO's.
        output["advantages"] = advantages.sum(-1) / mask.sum(-1).clamp(min=1)
        shown = self.accelerator.gather(output["advantages"]).tolist()
        for _ in range(min(len(shown), len(self._logs["advantages"]))):
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(shown)
        return {**output, **batch}

    def _whitened(self, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Advantages of mean 0 and deviation 1 over the steps of the mask, zero outside."""
        # (5) Whitening over processes: each has a part of the rollout, and all must use the same moments.
        exact = advantages.to(exact_dtype(advantages.device))
        total = self.accelerator.reduce(
            torch.stack([mask.sum().to(exact), exact.sum(), exact.square().sum()]), reduction="sum"
        ).tolist()
        n = max(total[0], 1.0)
        mean = total[1] / n
        variance = max(total[2] / n - mean**2, 0.0)
        # Advantages that differ only by rounding stay near zero.
        return (advantages - mean) / (variance + 1e-8) ** 0.5 * mask

    def _derived(self, means):
        """Adds the critic's explained variance, from the moments of the returns and of its errors."""
        if _RETURN in means:
            moments = [means.pop(name) for name in (_RETURN, _RETURN_SQUARED, _ERROR, _ERROR_SQUARED)]
            var_returns, var_error = (max(moments[i + 1] - moments[i] ** 2, 0.0) for i in (0, 2))
            means["explained_variance"] = 1 - var_error / var_returns if var_returns > 0 else 0.0
        return means

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        # transformers takes the mean of the batches' losses.
        means = {name: values[0] for name, values in self._metrics["eval"].items()}
        loss = self._loss(means["loss/policy"], means["loss/value"], means["entropy"])
        loss += self.router_aux_loss_coef * means.get("aux_loss", 0.0)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    # Loss

    def _prepare_inputs(self, generation_batch):
        """TRL's micro-batch, in training with `update_steps`: the steps of all micro-batches of its update, of all
        processes."""
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return inputs
        if self._counted is not self._buffered_inputs:  # a new rollout
            self._counted = self._buffered_inputs
            counts = torch.stack([batch["action_mask"].sum() for batch in self._buffered_inputs])
            self._counts = self.accelerator.reduce(counts, reduction="sum").tolist()
        accumulated = self.args.gradient_accumulation_steps
        first = self._step - self._step % accumulated
        of_update = [self._counts[i % len(self._counts)] for i in range(first, first + accumulated)]
        return {**inputs, "update_steps": sum(of_update)}

    def _loss(self, policy, value, entropy):
        return policy + self.args.vf_coef * value - self.args.entropy_coef * entropy

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
            self._add_ratios({name: (x * mask.sum(), mask.sum()) for name, x in logged.items()})
        loss = self._loss(policy_loss, value_loss, entropy)
        if "update_steps" not in inputs:
            return loss
        # Micro-batches are added up, and the processes' gradients averaged.
        return loss * mask.sum() * (self.accelerator.num_processes / max(inputs["update_steps"], 1))


def _refuse_processor(processing_class) -> None:
    """`ValueError` for the processor of a vision-language model."""
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"`processing_class` is a {type(processing_class).__name__}, but images are not supported: give its "
            "`.tokenizer` to train on text."
        )
