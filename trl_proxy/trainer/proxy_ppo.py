"""[`ProxyPPOTrainer`]: PPO on the gate (arXiv 2403.04283, section 3). The LM runs only in the rollout."""

import copy
import itertools
import math
import os
import time
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import BEMACallback

from ..core.config import WEIGHTS_NAME, proxy_file
from ..core.features import places_of
from ..core.rollout import Decisions, Rollout
from ..devices import exact_dtype
from ..modeling.card import CITATION
from ..modeling.causal_lm import ProxyModelForCausalLM
from ..modeling.proxies import WeightedProxy
from .actor_critic import ActorCriticTrainer
from .card import training_card
from .config import ProxyPPOConfig
from .decoding import settings_of
from .fields import ARGUMENTS
from .replay import ReplayBuffer, concatenate, is_read_by_loss

# About how many decisions are judged at once outside the update.
_CHUNK = 8192


class ProxyPPOTrainer(ActorCriticTrainer):
    """Trains a proxy by PPO on the reward of the finished responses; the LM stays frozen.

    Args:
        model ([`ProxyModelForCausalLM`]): the frozen LM with the proxy to train.
        reward_funcs, train_dataset, eval_dataset, processing_class, callbacks, ...: as for [`~trl.RLOOTrainer`].
        args ([`ProxyPPOConfig`], *optional*): training settings.

    Example:

    ```python
    >>> trainer = ProxyPPOTrainer(
    ...     model=ProxyModelForCausalLM(lm, ProxyConfig()),
    ...     reward_funcs=my_reward,
    ...     args=ProxyPPOConfig(output_dir="proxy"),
    ...     train_dataset=dataset,
    ...     processing_class=tokenizer,
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-proxy", "proxy-ppo"]
    _name = "Proxy-RLHF"
    _paper = {
        "title": "Proxy-RLHF: Decoupling Generation and Alignment in Large Language Model with Proxy",
        "id": "2403.04283",
        "citation": CITATION,
    }

    _refused_arguments = ARGUMENTS

    def __init__(self, model, reward_funcs, args: ProxyPPOConfig | None = None, processing_class=None, **kwargs):
        if not isinstance(model, ProxyModelForCausalLM):
            raise TypeError(
                f"`model` must be a ProxyModelForCausalLM, got {type(model).__name__}: wrap the LM with "
                "`ProxyModelForCausalLM(lm, ProxyConfig())`."
            )
        if isinstance(model.proxy, WeightedProxy):
            raise ValueError(f"The proxy {model.active_proxy!r} is a sum of others: train one of those.")
        args = args or ProxyPPOConfig(output_dir="proxy-ppo")
        if args.temperature not in (1.0, model.proxy_config.temperature):
            raise ValueError(
                f"`temperature` is {args.temperature} in the training arguments and {model.proxy_config.temperature} "
                "in the proxy: set it only in ProxyConfig."
            )
        fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if fsdp or is_deepspeed_zero3_enabled():
            raise ValueError(
                f"{'FSDP' if fsdp else 'ZeRO-3'} is not supported: it would shard the frozen LM. Use "
                "scripts/accelerate_configs/multi_gpu.yaml, and --load_in_4bit if the LM is too large for one GPU."
            )
        for callback in kwargs.get("callbacks") or ():
            _refuse_bema(callback)
        if isinstance(processing_class, PreTrainedTokenizerBase) and processing_class.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-sequence token: set `tokenizer.eos_token`.")
        # RLOO's own `beta` would load a second LM as reference. Our rollout already has the frozen LM's log-probs.
        without_reference = copy.copy(args)
        without_reference.beta = 0.0
        super().__init__(
            model=model, reward_funcs=reward_funcs, args=without_reference, processing_class=processing_class, **kwargs
        )
        self.args.beta = args.beta
        # With the proxy goes how its LM was decoded, so that evaluation and serving can do the same.
        decoding = {**(model.proxy_config.decoding or {}), **settings_of(args)}
        del decoding["max_new_tokens"]
        model.proxy.config.decoding = {name: value for name, value in decoding.items() if value} or None
        self._rollout: Any = None  # the latest Rollout, until `_collect` takes it
        self._replay = ReplayBuffer(args.replay_rollouts)

    def add_callback(self, callback):
        _refuse_bema(callback)
        super().add_callback(callback)

    # Rollout

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        model = self.accelerator.unwrap_model(self.model_wrapped)
        training = self.model.training
        # TRL repeats a prompt once per generation, and may spread the generations over processes. The LM reads a
        # prompt once for those that are here.
        rows = self.args.rollout_batch_size or len(prompt_ids)
        repeats = math.gcd(*(len(list(equal)) for _, equal in itertools.groupby(prompt_ids)))
        if repeats > rows:
            repeats = math.gcd(repeats, rows)
        prompts, size = prompt_ids[::repeats], rows // repeats
        started = time.perf_counter()
        completions, decisions, rollouts = [], [], []
        self._ended = []
        for start in range(0, len(prompts), size):
            token_ids, ended, output = self.decoding.generate(
                model,
                self.decoding.pad(prompts[start : start + size], self.accelerator.device),
                num_return_sequences=repeats,
                # Training explores; evaluation does what deployment does.
                gate_sample=training,
                output_rollout=True,
            )
            completions += token_ids
            self._ended += ended
            decisions.append(output.decisions)
            rollout = output.rollout
            rollouts.append(rollout._replace(hidden=self._stored(rollout.hidden)))
        self._rollout = rollouts[0] if len(rollouts) == 1 else Rollout(*map(concatenate, zip(*rollouts)))
        self._log_rollout(Decisions(*map(torch.cat, zip(*decisions))), time.perf_counter() - started)
        return completions

    def _stored(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states of a rollout on the device that keeps them until an update."""
        return hidden.cpu() if self.args.offload_rollouts else hidden.to(self.accelerator.device)

    def _log_rollout(self, decisions: Decisions, seconds: float) -> None:
        rollout = self._rollout
        self._response_tokens = tokens = decisions.tokens
        asked, accepted = rollout.mask.sum(-1), (rollout.accept & rollout.mask).sum(-1)
        self._add_ratios(
            {
                "accept_rate": (accepted, asked),
                "decisions_per_token": (asked, tokens),
                "lm_forwards_per_token": (decisions.lm_forwards, tokens),
                "accepted_rank": (decisions.rank_sum, tokens),
                "lm_logp_per_token": (rollout.token_log_probs, tokens),
                # All processes decode at the same time.
                "episodes_per_second": (torch.ones_like(tokens), seconds / self.accelerator.num_processes),
                "tokens_per_second": (tokens, seconds / self.accelerator.num_processes),
            }
        )

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        # PPO on the gate does not need RLOO's log-probs of whole responses under the LM.
        zeros = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
        return zeros, zeros, None

    def _collect(self, output):
        rollout, self._rollout = self._rollout, None
        model = self.accelerator.unwrap_model(self.model_wrapped)
        size = max(_CHUNK // rollout.mask.shape[1], 1)
        chunks = [Rollout(*(x[i : i + size] for x in rollout)) for i in range(0, len(rollout.mask), size)]
        with torch.no_grad():
            if self.model.training and model.gate.is_new:
                self._standardise(model, chunks)
            judged = [_judged(model, model, chunk) for chunk in chunks]
        per_decision, _, values = (torch.cat(x) for x in zip(*judged))
        # (7) Sign of the KL: KL(gated LM || LM) is the mean of log pi(token) - log p(token) over the gate's own paths.
        self._add_ratios({"kl": (per_decision.sum(-1) - rollout.token_log_probs, self._response_tokens)})
        batch = {
            "action_mask": rollout.mask,
            "action_positions": rollout.positions,
            "action_log_probs": per_decision,
            "state_values": values,
            **{f"rollout_{name}": value for name, value in rollout._asdict().items()},
        }
        beta, coef = self.args.beta, self.args.lm_logp_coef
        if beta or coef:
            # (7) Sign of the KL: it is a penalty, so `beta` pays log p - log pi, and `lm_logp_coef` pays log p alone.
            # (2) Decision mask: a position without a decision has nothing to learn from.
            price = (beta + coef) * rollout.lm_log_probs - beta * batch["action_log_probs"]
            batch["step_rewards"] = price * rollout.mask
        return batch

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training or self.args.replay_rollouts == 1:
            return output
        return self._replay.add({name: output[name] for name in output if is_read_by_loss(name)})

    def _replay_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"replay_{self.accelerator.process_index}.safetensors")

    def _save_rng_state(self, output_dir):
        """Saves the random state and the rollouts of each process. The rollouts are saved here because the checksums
        are written afterwards."""
        super()._save_rng_state(output_dir)
        self._replay.save(self._replay_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and os.path.isfile(path := self._replay_file(checkpoint)):
            device = self.accelerator.device
            self._replay.load(path, lambda name, x: self._stored(x) if name == "rollout_hidden" else x.to(device))

    def _standardise(self, model: ProxyModelForCausalLM, chunks: list[Rollout]) -> None:
        """Sets the moments of the gate's input, from the first rollout of all processes: observation normalisation
        (Andrychowicz et al. 2021, arXiv 2006.05990, section 3.3). They never change afterwards. A new gate's decisions
        do not depend on them."""
        size, device = sum(model.gate.part_sizes), self.accelerator.device
        exact = exact_dtype(device)
        sums = torch.zeros(2 * size + 1, dtype=exact, device=device)
        for chunk in chunks:
            parts, _ = model.gate.normalise(model.rollout_features(chunk))
            totals = [parts.sum(0, dtype=exact), parts.square().sum(0, dtype=exact)]
            sums += torch.cat([*totals, sums.new_tensor([len(parts)])])
        *sums, count = self.accelerator.reduce(sums, reduction="sum").split([size, size, 1])
        mean, square = (x / count.clamp(min=1) for x in sums)
        if count > 1:
            for network in (model.gate, model.critic):
                network.standardise(mean, (square - mean.square()).clamp(min=0).sqrt())

    # Update

    def _evaluate_actions(self, model, inputs):
        rollout = Rollout(*(inputs[f"rollout_{name}"] for name in Rollout._fields))
        return _judged(model, self.accelerator.unwrap_model(self.model_wrapped), rollout)

    # Checkpoints hold only the proxy

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Writes the card of a proxy, in place of TRL's card of a fine-tuned model."""
        if self.is_world_process_zero():
            training_card(self, model_name, dataset_name, tags).save(os.path.join(self.args.output_dir, "README.md"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        model.proxy.load_weights(proxy_file(resume_from_checkpoint, WEIGHTS_NAME))

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _refuse_bema(callback) -> None:
    if issubclass(callback if isinstance(callback, type) else type(callback), BEMACallback):
        raise ValueError(
            "BEMACallback is not supported: it builds a second model from the configuration, and a proxy needs its LM."
        )


def _bernoulli(logits: torch.Tensor, accept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each accept or reject `(N,)`, and the entropy of that decision."""
    log_prob = -F.binary_cross_entropy_with_logits(logits, accept.to(logits), reduction="none")
    entropy = F.binary_cross_entropy_with_logits(logits, torch.sigmoid(logits), reduction="none")
    return log_prob, entropy


def _judged(model, proxy_model: ProxyModelForCausalLM, rollout: Rollout) -> tuple[torch.Tensor, ...]:
    """Log-probabilities and entropies of a rollout's decisions, and state values, `(B, D)` each.

    Args:
        model: the `proxy_model`, or what accelerate has wrapped it in.
    """
    mask = rollout.mask
    places = places_of(mask.flatten())
    with torch.no_grad():
        features = proxy_model.rollout_features(rollout, places)
    output = model(gate_features=features)
    logits = output.accept_logits - proxy_model.proxy_config.threshold
    log_probs, entropies = _bernoulli(logits, rollout.accept.flatten()[places])
    # (1) (2) Forced candidates and padding are no decisions: they have no log-probability and no value.
    zeros = logits.new_zeros(mask.numel())
    judged = (zeros.index_copy(0, places, x).view_as(mask) for x in (log_probs, entropies, output.state_values))
    return tuple(torch.where(mask, x, 0.0) for x in judged)
