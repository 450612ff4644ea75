"""Tiny trainings that record what they did, and their comparison with the twin of `brute_force_step.py`."""

import copy
from dataclasses import dataclass, field
from typing import Any

import brute_force_step as twin
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from trl_proxy import PPOConfig, PPOTrainer, ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.runs.fit import share_cpu_device

EOS = [2, *range(6, 96, 5)]  # a fifth of the vocabulary, so that some responses end
PROMPTS = [f"{a}{b} "[: 1 + i % 3] for i, (a, b) in enumerate(zip("abcdefghijkl", "mnopqrstuvwx", strict=True))]
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
LAST_OF_GATE = "proxies.default.gate.mlp.2.weight"
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def spelling(prompts, completions, **kwargs):
    """A number for each text, of both signs."""
    return [
        sum((ord(c) * (i + 3)) % 11 - 5 for i, c in enumerate(p + text)) / 6 for p, text in zip(prompts, completions)
    ]


def capitals(prompts, completions, **kwargs):
    """Applies to some texts only."""
    return [
        None if len(p + text) % 3 == 0 else sum(c.isupper() for c in text) / 2 for p, text in zip(prompts, completions)
    ]


@dataclass
class Scored:
    """A rollout of one process: what the trainer was given and what it made of it."""

    prompts: list[str]
    token_ids: list[list[int]]
    ended: list[bool]
    rollout: Any  # of the gate's decisions, None if the LM is trained
    weights: dict[str, torch.Tensor]
    result: dict[str, torch.Tensor]
    shown: list[float]  # advantages in the table of completions


@dataclass
class Update:
    """An optimizer's step of one process: the rows of the rollouts in use, for each micro-batch, and the gradients."""

    weights: dict[str, torch.Tensor]
    rows: list[list[int]] = field(default_factory=list)
    rollouts: int = 0  # that had been made
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


class RecordingMixin(TrainerCallback):
    """A mixin to list before a trainer; it is its own callback."""

    def _snapshot(self) -> dict[str, torch.Tensor]:
        state = self.accelerator.unwrap_model(self.model).state_dict()
        return {name: x.clone() for name, x in state.items() if not name.startswith("lm.")}

    def _generate_single_turn(self, *args):
        token_ids = super()._generate_single_turn(*args)
        rollout = getattr(self, "_rollout", None)
        ids = token_ids if isinstance(token_ids, list) else token_ids[0]
        self.generated = copy.deepcopy((ids, self._ended, rollout))
        return token_ids

    def _generate_and_score_completions(self, inputs):
        weights = self._snapshot()
        output = super()._generate_and_score_completions(inputs)
        count = len(output["action_mask"])
        shown = list(self._logs["advantages"])[-len(inputs) * self.accelerator.num_processes :]
        kept = {name: x.clone() for name, x in output.items() if isinstance(x, torch.Tensor)}
        rollouts = self.rollouts if self.model.training else self.evaluated
        rollouts.append(Scored([row["prompt"] for row in inputs], *self.generated, weights, kept, shown))
        return {**output, "row": torch.arange(count)}

    def _compute_loss(self, model, inputs):
        if self.model.training:
            self.updates[-1].rows.append(inputs["row"].tolist())
        return super()._compute_loss(model, inputs)

    def on_step_begin(self, args, state, control, **kwargs):
        self.updates.append(Update(self._snapshot()))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        update = self.updates[-1]
        update.rollouts = len(self.rollouts)
        model = self.accelerator.unwrap_model(self.model)
        update.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class RecordedProxyPPO(RecordingMixin, ProxyPPOTrainer):
    pass


class RecordedPPO(RecordingMixin, PPOTrainer):
    pass


def tiny_lm(seed: int) -> LlamaForCausalLM:
    """One layer of size 8; a response of it ends with one token in five."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.5, pad_token_id=2, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def randomise(module: nn.Module, seed: int, scale: float = 0.7) -> None:
    """Weights far from where training starts, so that ratios, entropies and values matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*module.named_parameters(), *module.named_buffers()]:
            x.copy_(torch.randn(x.shape, generator=generator) * scale)
            if name.endswith("feature_std"):
                x.copy_(x.abs() + 0.5)


def make_trainer(options: dict, tokenizer: PreTrainedTokenizerFast, output_dir: str):
    """The trainer of `options`: fields of its configuration, fields of ProxyConfig under `proxy`, and
    `lm_itself` (PPO on the LM), `new_gate` (a gate that training has not touched yet), `rewards`, `seed`, `updates`,
    `idle_ranks` (some process has nothing to learn from)."""
    options = dict(options)
    seed, names = options.pop("seed", 0), options.pop("rewards", ["spelling"])
    proxy, new, lm_itself = options.pop("proxy", {}), options.pop("new_gate", False), options.pop("lm_itself", False)
    updates, _ = options.pop("updates", 3), options.pop("idle_ranks", None)
    settings = {
        "output_dir": output_dir, "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "seed": seed,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "steps_per_generation": 1,
        "num_iterations": 1, "gradient_accumulation_steps": 1, "max_completion_length": 4, "max_steps": updates,
        "logging_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0, "learning_rate": 0.05,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False, "dataloader_pin_memory": False,
        **options,
    }  # fmt: skip
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token  # no response ends with padding by chance
    lm, more = tiny_lm(seed), {}
    if lm_itself:
        model, trainer_class, config_class = lm, RecordedPPO, PPOConfig
        more["peft_config"] = LORA
    else:
        config = {"p_t": 0.02, "max_candidates": 4, "gate_hidden_sizes": [4], **proxy}
        model, trainer_class, config_class = (
            ProxyModelForCausalLM(lm, ProxyConfig(**config)),
            RecordedProxyPPO,
            ProxyPPOConfig,
        )
        randomise(model.proxy, seed + 1)
        if new:
            nn.init.zeros_(model.gate.mlp[-1].weight)
            for network in (model.gate, model.critic):
                network.standardise(torch.zeros_like(network.feature_mean), torch.ones_like(network.feature_std))
    data = Dataset.from_dict({"prompt": PROMPTS})
    args = config_class(**settings)
    share_cpu_device(args)
    trainer = trainer_class(
        model=model, reward_funcs=[globals()[name] for name in names], args=args,
        train_dataset=data, eval_dataset=data.select(range(5)), processing_class=tokenizer, **more,
    )  # fmt: skip
    if lm_itself:
        randomise(trainer._head_owner().value_head, seed + 1)
    trainer.rollouts, trainer.evaluated, trainer.updates = [], [], []
    trainer.add_callback(trainer)
    return trainer


def train(options: dict, tokenizer: PreTrainedTokenizerFast, output_dir: str):
    """A trainer of `make_trainer` after training and an evaluation; a new gate is evaluated before as well, which must
    not set the moments of its input."""
    trainer = make_trainer(options, tokenizer, output_dir)
    if options.get("new_gate"):
        trainer.evaluate()
    trainer.train()
    trainer.evaluated.clear()
    trainer.evaluation = trainer.evaluate()
    return trainer


def check(trainer, options: dict) -> None:
    """`AssertionError` where a trained trainer, with all other processes, differs from the twin; on the first process
    alone."""
    ranks = gather_object([(trainer.rollouts, trainer.updates, trainer.evaluated)])
    if trainer.accelerator.is_main_process:
        comparison = Comparison(trainer, ranks, options)
        comparison.check_training()
        comparison.check_evaluation()
        if options.get("idle_ranks"):
            comparison.check_idle()


class Comparison:
    """A training, recorded by each process, beside the same in the twin."""

    def __init__(self, trainer, ranks: list, options: dict):
        self.trainer, self.args = trainer, trainer.args
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        self.lm_itself, self.names = options.get("lm_itself", False), options.get("rewards", ["spelling"])
        names = ["gamma", "gae_lambda", "vf_coef", "cliprange_value", "entropy_coef", "normalize_advantages"]
        names += ["group_baseline", "missing_eos_penalty", "reward_shaping_tokens", "beta", "reward_clip_range"]
        names += ["mask_truncated_completions", "epsilon", "epsilon_high"]
        self.options = {name: getattr(self.args, name) for name in names}
        self.options["lm_logp_coef"] = getattr(self.args, "lm_logp_coef", 0.0)
        self.options["reward_weights"] = self.args.reward_weights or [1.0] * len(self.names)
        self.replay = getattr(self.args, "replay_rollouts", 1)
        self.rollouts, self.updates, self.evaluated = (list(zip(*x, strict=True)) for x in zip(*ranks, strict=True))
        self.moments = None  # of the gate's input, if the training has set them

    def check_training(self) -> None:
        logs = {log["step"]: log for log in self.trainer.state.log_history if "loss" in log}
        scored: list[list[list[twin.Response]]] = []  # of each rollout, the responses of each process
        for step, update in enumerate(self.updates, 1):
            expected = {}
            while len(scored) < update[0].rollouts:
                parts = self.rollouts[len(scored)]
                responses = [self.responses(part) for part in parts]
                scored.append(responses)
                decisions = sum(len(x.actions) for of_rank in responses for x in of_rank)
                is_new = not self.lm_itself and not self.moments and not parts[0].weights[LAST_OF_GATE].any()
                if is_new and decisions > 1:
                    self.moments = twin.standardise([x for of_rank in responses for x in of_rank])
                expected |= self.score([x for of_rank in responses for x in of_rank], parts[0].weights)
                if self.options["normalize_advantages"] and is_degenerate(responses):
                    return
                if not self.lm_itself:
                    tokens_per_episode = logs[step]["tokens_per_second"] / logs[step]["episodes_per_second"]
                    close(tokens_per_episode, expected["completions/mean_length"], f"speeds at step {step}")
                for rank, part in enumerate(parts):
                    self.check_rows(rank, part, [one[rank] for one in scored[-self.replay :]])
            actions = []
            for rank, part in enumerate(update):
                rows = [x for one in scored[-self.replay :] for x in one[rank]]
                actions += [a for micro_batch in part.rows for i in micro_batch for a in rows[i].actions]
            evaluate, parameters = self.evaluator(update[0].weights)
            judged = evaluate(actions)
            result = twin.update(actions, self.options, *(x.tolist() for x in judged))
            weights = list(parameters.values())
            gradients = [torch.zeros_like(x) for x in weights]
            if actions:
                gradients = torch.autograd.grad(judged, weights, result.slopes, materialize_grads=True)
            for part in update:
                assert part.gradients.keys() == parameters.keys()
                for name, gradient in zip(parameters, gradients, strict=True):
                    close(part.gradients[name], gradient, f"gradient of {name} at step {step}")
            for name, value in (expected | result.metrics).items():
                close(logs[step][name], value, f"{name} at step {step}")
        if self.moments:
            for network in (self.model.gate, self.model.critic):
                close(network.feature_mean, self.moments[0], "mean of the gate's input")
                close(network.feature_std, self.moments[1], "deviation of the gate's input")

    def check_idle(self) -> None:
        """Some process had nothing to learn from in an update in which another had."""
        counts = [[int(part.result["action_mask"].sum()) for part in parts] for parts in self.rollouts]
        assert any(0 in of_ranks and max(of_ranks) > 0 for of_ranks in counts), counts

    def check_evaluation(self) -> None:
        missing, evaluated = len(self.trainer.eval_dataset) * self.trainer.num_generations_eval, []
        for parts in self.evaluated:
            batch = [response for part in parts for response in self.responses(part)][:missing]
            missing -= len(batch)
            self.score(batch, parts[0].weights, training=False)  # advantages are whitened for each batch
            evaluated += batch
        evaluate, _ = self.evaluator(self.evaluated[-1][0].weights)
        with torch.no_grad():
            expected = self.score(evaluated, self.evaluated[-1][0].weights, training=False, again=True)
            actions = [action for response in evaluated for action in response.actions]
            expected |= twin.update(actions, self.options, *(x.tolist() for x in evaluate(actions))).metrics
        for name, value in expected.items():
            close(self.trainer.evaluation[f"eval_{name}"], value, f"{name} of the evaluation")

    def score(
        self, rollout: list[twin.Response], weights, training: bool = True, again: bool = False
    ) -> dict[str, float]:
        """Scores a rollout, or with `again` leaves it as it is; the metrics of it."""
        evaluate, _ = self.evaluator(weights)
        group = self.args.num_generations if training else self.trainer.num_generations_eval
        if not again:
            with torch.no_grad():
                twin.score_rollout(rollout, {**self.options, "group": group}, evaluate, training)
        metrics = twin.rollout_metrics(rollout) | twin.reward_metrics(rollout, self.options, self.names)
        if not self.lm_itself and self.model.proxy_config.features == "prefix":
            metrics["lm_forwards_per_token"] = 1.0
        if self.lm_itself and not self.options["beta"]:
            del metrics["kl"]
        return metrics

    def check_rows(self, rank: int, part: Scored, rollouts: list[list[twin.Response]]) -> None:
        """What the loss reads of a process's rows of the latest rollouts."""
        for i, response in enumerate(x for rollout in rollouts for x in rollout):
            mask = part.result["action_mask"][i]
            assert int(mask.sum()) == len(response.actions)
            for name, key in (
                ("action_log_probs", "log_prob"),
                ("state_values", "value"),
                ("returns", "value_target"),
                ("advantages_per_step", "learned_advantage"),
            ):
                expected = [getattr(action, key) for action in response.actions]
                close(part.result[name][i][mask], expected, f"{name} of row {i} on rank {rank}")
            assert not part.result["advantages_per_step"][i][~mask].any()
        newest = [[action.advantage for action in response.actions] for response in rollouts[-1]]
        expected = [sum(x) / max(len(x), 1) for x in newest]
        close(part.shown[rank * len(newest) :][: len(newest)], expected, "advantages in the table of completions")

    def responses(self, part: Scored) -> list[twin.Response]:
        """What the twin starts from."""
        every = self.options["reward_shaping_tokens"]
        ends = [None, *(range(every, self.trainer.max_completion_length, every) if every else ())]
        tokenizer, found = self.trainer.processing_class, []
        for i, (prompt, ids, ended) in enumerate(zip(part.prompts, part.token_ids, part.ended, strict=True)):
            rewards = {}
            for end in ends:
                text = tokenizer.decode(ids[:end], skip_special_tokens=True)
                rewards[end] = [globals()[name]([prompt], [text])[0] for name in self.names]
            response = twin.Response(ended, rewards, [], {"tokens": len(ids)})
            if self.lm_itself:
                self.add_tokens(response, tokenizer(prompt)["input_ids"], ids)
            else:
                self.add_decisions(response, part.rollout, i)
            found.append(response)
        return found

    def add_tokens(self, response: twin.Response, prompt: list[int], ids: list[int]) -> None:
        with torch.no_grad():
            logits = tiny_lm(self.args.seed).double()(torch.tensor([prompt + ids])).logits[0] / self.args.temperature
        for t, token in enumerate(ids):
            log_prob = logits[len(prompt) + t - 1].log_softmax(-1)[token].item()
            action = twin.Action(t, lm_log_prob=log_prob, text=prompt + ids, index=len(prompt) + t)
            response.actions.append(action)

    def add_decisions(self, response: twin.Response, rollout, row: int) -> None:
        config, embeddings = self.model.proxy_config, self.model.get_input_embeddings().weight
        rejections = 0
        for t in rollout.mask[row].nonzero()[:, 0].tolist():
            parts = list(rollout.hidden[row, rollout.hidden_index[row, t]].split(config.hidden_size))
            scalars = []
            if config.features == "prefix":
                parts.append(embeddings[rollout.token_ids[row, t]].detach())
                scalars = rollout.scalars[row, t].tolist()
            accept, position = bool(rollout.accept[row, t]), int(rollout.positions[row, t])
            rejections += not accept
            lm_log_prob = rollout.lm_log_probs[row, t].item()
            response.actions.append(twin.Action(position, accept, twin.normalise(parts), scalars, lm_log_prob))
        response.counts |= {"rank_sum": rejections, "token_log_prob": rollout.token_log_probs[row].item()}

    def evaluator(self, weights: dict[str, torch.Tensor]):
        """The twin's policy and critic with the weights of a moment, and its parameters by name."""
        if self.lm_itself:
            return self.lm_evaluator(weights)
        parameters = {name: x.double().requires_grad_() for name, x in weights.items() if ".feature_" not in name}
        networks = []
        for name in ("gate", "critic"):
            prefix = f"proxies.default.{name}."
            moments = self.moments or [weights[f"{prefix}feature_{x}"].double() for x in ("mean", "std")]
            layers = [[parameters[f"{prefix}mlp.{i}.{x}"] for x in ("weight", "bias")] for i in (0, 2)]
            networks.append(twin.Network(*moments, layers))
        return twin.judge(*networks, self.model.proxy_config.threshold), parameters

    def lm_evaluator(self, weights: dict[str, torch.Tensor]):
        lm = get_peft_model(tiny_lm(self.args.seed), LORA)
        lm.get_base_model().value_head = nn.ModuleDict({"linear": nn.Linear(8, 1)})
        lm.double().load_state_dict(weights)
        head = lm.get_base_model().value_head["linear"]

        def evaluate(actions: list[twin.Action]):
            if not actions:
                return (torch.zeros(0, dtype=torch.float64),) * 3
            outputs = {}
            for action in actions:
                if tuple(action.text) not in outputs:
                    outputs[tuple(action.text)] = lm(torch.tensor([action.text]), output_hidden_states=True)
            log_probs, entropies, values = [], [], []
            for action in actions:
                output, before = outputs[tuple(action.text)], action.index - 1
                of_tokens = (output.logits[0, before] / self.args.temperature).log_softmax(-1)
                log_probs.append(of_tokens[action.text[action.index]])
                entropies.append(-(of_tokens.exp() * of_tokens).sum())
                values.append(output.hidden_states[-1][0, before] @ head.weight[0] + head.bias[0])
            return [torch.stack(x) for x in (log_probs, entropies, values)]

        return evaluate, {name: p for name, p in lm.named_parameters() if p.requires_grad}


def is_degenerate(rollout: list[list[twin.Response]]) -> bool:
    """Whether all advantages are nearly the same: whitened, they are what rounding left of their differences."""
    found = [action.advantage for part in rollout for response in part for action in response.actions]
    return len(found) > 1 and twin.variance(found) < 1e-6


def close(found, expected, what: str) -> None:
    """`AssertionError` that says what differs."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    torch.testing.assert_close(found, expected, **TOLERANCE, msg=lambda message: f"{what}: {message}")
