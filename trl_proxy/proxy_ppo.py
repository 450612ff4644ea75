"""[`ProxyPPOTrainer`]: PPO on the gate (arXiv 2403.04283, section 3). The LM runs in the rollout alone."""

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.data_utils import is_conversational
from trl.trainer.utils import pad

from .actor_critic import ActorCriticTrainer
from .card import CITATION, proxy_card
from .config import WEIGHTS_NAME, ProxyPPOConfig, proxy_file
from .modeling import ProxyModelForCausalLM
from .proxies import WeightedProxy
from .rollout import Decisions, Rollout

# Decisions whose features are made and judged at once outside the update, about.
_CHUNK = 8192
# Beside the rollout itself.
_READ_BY_LOSS = ("action_mask", "action_log_probs", "advantages_per_step", "state_values", "returns")


class ProxyPPOTrainer(ActorCriticTrainer):
    """Trains a proxy by PPO on the reward of the finished responses; the language model is not touched.

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
                "in the proxy: the proposals' temperature is the proxy's, set it in ProxyConfig alone."
            )
        fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if fsdp or is_deepspeed_zero3_enabled():
            raise ValueError(
                f"{'FSDP' if fsdp else 'ZeRO-3'} is not supported: it would cut the frozen LM into parts. Take "
                "scripts/accelerate_configs/multi_gpu.yaml, and --load_in_4bit where the LM is too large for one GPU."
            )
        if processing_class is not None and processing_class.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-sequence token: set `tokenizer.eos_token`.")
        # RLOO's own `beta` would load a second LM as reference. Ours is the frozen LM: the rollout has its log-probs.
        beta, args.beta = args.beta, 0.0
        super().__init__(
            model=model, reward_funcs=reward_funcs, args=args, processing_class=processing_class, **kwargs
        )
        args.beta = beta
        for dataset in (kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
            _check_prompt_lengths(dataset, self._tokenizer, model, args)
        self._rollout: Any = None  # the Rollout that was generated last, until `_collect` takes it
        self._replay: list[dict[str, torch.Tensor]] = []

    # Rollout

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        device = self.accelerator.device
        model = self.accelerator.unwrap_model(self.model_wrapped)
        training = self.model.training
        prompts = [torch.tensor(ids) for ids in prompt_ids]
        # TRL repeats a prompt once per generation; the LM reads it once.
        repeats = self.num_generations if training else self.num_generations_eval
        if any(prompt_ids[i] != prompt_ids[i - i % repeats] for i in range(len(prompt_ids))):
            repeats = 1
        prompts = prompts[::repeats]
        size = max((self.args.rollout_batch_size or len(prompt_ids)) // repeats, 1)
        started = time.perf_counter()
        completions, decisions, rollouts = [], [], []
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            ids = pad(chunk, padding_value=self._tokenizer.pad_token_id, padding_side="left").to(device)
            mask = pad([torch.ones_like(x) for x in chunk], padding_value=0, padding_side="left").to(device)
            output = model.generate(
                ids,
                attention_mask=mask,
                generation_config=self.generation_config,
                num_return_sequences=repeats,
                # Training explores; evaluation does what deployment does.
                gate_sample=training,
                output_rollout=True,
            )
            responses = output.sequences[:, ids.shape[1] :]
            lengths = output.decisions.tokens.tolist()
            completions += [row[:n] for row, n in zip(responses.tolist(), lengths, strict=True)]
            decisions.append(output.decisions)
            rollout = output.rollout
            rollouts.append(rollout._replace(hidden=self._stored(rollout.hidden)))
        self._rollout = _concatenate(rollouts)
        self._log_rollout(Decisions(*map(torch.cat, zip(*decisions))), time.perf_counter() - started)
        return completions

    def _stored(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states of a rollout where they are kept until an update reads them."""
        return hidden.cpu() if self.args.offload_rollouts else hidden.to(self.accelerator.device)

    def _log_rollout(self, decisions: Decisions, seconds: float) -> None:
        rollout = self._rollout
        local = [
            decisions.tokens.sum(),
            decisions.lm_forwards.sum(),
            decisions.rank_sum.sum(),
            rollout.mask.sum(),
            (rollout.accept & rollout.mask).sum(),
            rollout.token_log_probs.sum(),
            len(rollout.mask),
        ]
        local = torch.tensor([float(x) for x in local], dtype=torch.float64, device=self.accelerator.device)
        total = self.accelerator.reduce(local.float() if local.device.type == "mps" else local, reduction="sum")
        tokens, forwards, rejections, asked, accepted, log_prob, episodes = total.tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in {
            "accept_rate": accepted / max(asked, 1),
            "decisions_per_token": asked / tokens,
            "lm_forwards_per_token": forwards / tokens,
            "accepted_rank": rejections / tokens,
            "lm_logp_per_token": log_prob / tokens,
            "episodes_per_second": episodes / seconds,
            "tokens_per_second": tokens / seconds,
        }.items():
            metrics[name].append(value)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        # RLOO's log-probs of whole responses under the LM: PPO on the gate has no use for them.
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
            judged = [model(gate_features=model.rollout_features(chunk)) for chunk in chunks]
        logits = torch.cat([x.accept_logits for x in judged]) - model.proxy_config.threshold
        log_probs, _ = _bernoulli(logits, rollout.accept[rollout.mask])
        # KL(gated LM || LM) per token along the paths taken: log pi(token) - log p(token).
        kl = torch.stack([log_probs.sum() - rollout.token_log_probs.sum(), output["completion_mask"].sum().float()])
        kl = self.accelerator.reduce(kl, reduction="sum")
        self._metrics["train" if self.model.training else "eval"]["kl"].append((kl[0] / kl[1]).item())
        batch = {
            "action_mask": rollout.mask,
            "action_positions": rollout.positions,
            "action_log_probs": _unflatten(log_probs, rollout.mask),
            "state_values": _unflatten(torch.cat([x.state_values for x in judged]), rollout.mask),
            **{f"rollout_{name}": value for name, value in rollout._asdict().items()},
        }
        beta, coef = self.args.beta, self.args.lm_logp_coef
        if beta or coef:
            # The estimate of the KL as a penalty, and the price of what the LM finds unlikely, at the decisions. Where
            # none was taken there is nothing to learn from it.
            price = (beta + coef) * rollout.lm_log_probs - beta * batch["action_log_probs"]
            batch["step_rewards"] = price * rollout.mask
        return batch

    # Replay: features are cached, so a rollout can be learnt from for as long as PPO's ratio to the policy that made
    # it stays near 1 (sample reuse as in Queeney et al. 2021, arXiv 2111.00072, with PPO's own clipping).

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training or self.args.replay_rollouts == 1:
            return output
        fresh = {name: x for name, x in output.items() if name in _READ_BY_LOSS or name.startswith("rollout_")}
        self._replay = [*self._replay, fresh][-self.args.replay_rollouts :]
        return {name: _cat([one[name] for one in self._replay]) for name in fresh}

    def _replay_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"replay_{self.accelerator.process_index}.safetensors")

    def _save_rng_state(self, output_dir):
        """Beside the random numbers' state what else a resumed run needs of each process: the rollouts so far."""
        super()._save_rng_state(output_dir)
        if self._replay:
            tensors = {f"{i}.{name}": x.clone() for i, one in enumerate(self._replay) for name, x in one.items()}
            os.makedirs(output_dir, exist_ok=True)
            save_file(tensors, self._replay_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and os.path.isfile(path := self._replay_file(checkpoint)):
            rollouts: dict[int, dict[str, torch.Tensor]] = {}
            for key, x in load_file(path).items():
                i, name = key.split(".", 1)
                is_hidden = name == "rollout_hidden"
                rollouts.setdefault(int(i), {})[name] = self._stored(x) if is_hidden else x.to(self.accelerator.device)
            self._replay = [rollouts[i] for i in sorted(rollouts)]

    def _standardise(self, model: ProxyModelForCausalLM, chunks: list[Rollout]) -> None:
        """Moments of the gate's input over the first rollout of all processes, kept from then on: observation
        normalisation (Andrychowicz et al. 2021, arXiv 2006.05990, section 3.3). The decisions of a new gate do not
        depend on them."""
        size = sum(model.gate.part_sizes)
        sums = torch.zeros(2 * size + 1, device=self.accelerator.device)
        for chunk in chunks:
            parts, _ = model.gate.normalise(model.rollout_features(chunk))
            sums += torch.cat([parts.sum(0), parts.square().sum(0), parts.new_tensor([len(parts)])])
        *sums, count = self.accelerator.reduce(sums, reduction="sum").split([size, size, 1])
        mean, square = (x / count.clamp(min=1) for x in sums)
        if count > 1:
            for network in (model.gate, model.critic):
                network.standardise(mean, (square - mean.square()).clamp(min=0).sqrt())

    # Update

    def _evaluate_actions(self, model, inputs):
        rollout = Rollout(*(inputs[f"rollout_{name}"] for name in Rollout._fields))
        proxy_model = self.accelerator.unwrap_model(self.model_wrapped)
        with torch.no_grad():
            features = proxy_model.rollout_features(rollout)
        output = model(gate_features=features)
        logits = output.accept_logits - proxy_model.proxy_config.threshold
        log_probs, entropies = _bernoulli(logits, rollout.accept[rollout.mask])
        return tuple(_unflatten(x, rollout.mask) for x in (log_probs, entropies, output.state_values))

    # Checkpoints hold the proxy alone

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """A card of what this is: not a fine-tuned model but a proxy over one."""
        if not self.is_world_process_zero():
            return
        rewards = ", ".join(
            f"{weight:g} x `{name}`"
            for name, weight in zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
        )
        measured = [log["eval_reward"] for log in self.state.log_history if "eval_reward" in log]
        training = (
            f"It was trained by PPO with `trl-proxy` on {dataset_name or 'the prompts given to the trainer'} for "
            f"{self.state.global_step} steps, on the reward {rewards}."
        )
        if measured:
            training += (
                f" On the validation prompts the reward was {measured[0]:.3f} at first, {max(measured):.3f} at best."
            )
        card = proxy_card(
            self.model.proxy_config,
            *self.model.get_nb_trainable_parameters(),
            revision=getattr(self.model.lm.config, "_commit_hash", None),
            training=training,
            name=model_name,
            dataset=dataset_name,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        )
        card.save(os.path.join(self.args.output_dir, "README.md"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        model.proxy.load_weights(proxy_file(resume_from_checkpoint, WEIGHTS_NAME))

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _bernoulli(logits: torch.Tensor, accept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each accept or reject `(N,)`, and the entropy of that decision."""
    log_prob = -F.binary_cross_entropy_with_logits(logits, accept.to(logits), reduction="none")
    entropy = F.binary_cross_entropy_with_logits(logits, torch.sigmoid(logits), reduction="none")
    return log_prob, entropy


def _unflatten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`(N,)` values of the True entries of `mask` `(B, D)`, in their places; zero elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _concatenate(rollouts: list[Rollout]) -> Rollout:
    """Rollouts of several batches as one, padded to the longest."""
    if len(rollouts) == 1:
        return rollouts[0]

    return Rollout(*(_cat(x) for x in zip(*rollouts)))


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of several batches, `(B, ...)` each, with zeros where a row has fewer entries than the longest."""
    if tensors[0].dim() > 1:
        width = max(x.shape[1] for x in tensors)
        tensors = [F.pad(x, (*[0] * (2 * x.dim() - 4), 0, width - x.shape[1])) for x in tensors]
    return torch.cat(tensors)


def _check_prompt_lengths(dataset, tokenizer, model: nn.Module, args: ProxyPPOConfig) -> None:
    """`ValueError` where a prompt and its response need more positions than the LM has."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or dataset is None or isinstance(dataset, dict) or not hasattr(dataset, "__len__"):
        return
    room = limit - args.max_completion_length
    for prompt in dataset["prompt"] if "prompt" in (dataset.column_names or []) else []:
        conversational = is_conversational({"prompt": prompt})
        text = "".join(str(message["content"]) for message in prompt) if conversational else prompt
        # A token stands for one character at least, and a template adds some: short prompts need no counting.
        if len(text) + 256 < room:
            continue
        if conversational:
            template = {"add_generation_prompt": True, "return_dict": True, **(args.chat_template_kwargs or {})}
            length = len(tokenizer.apply_chat_template(prompt, **template)["input_ids"])
        else:
            length = len(tokenizer(text)["input_ids"])
        if length > room:
            raise ValueError(
                f"A prompt has {length} tokens; with max_completion_length={args.max_completion_length} the LM's "
                f"{limit} positions leave {room}. It begins with {text[:200]!r}."
            )
