"""What the processes of one training find out, for test_scale.py: two rollouts, four updates, two evaluations.

Arguments: the folders of a tiny LM with its tokenizer and of a proxy over it, and the output folder, which gets
`found.json`. All is in float64 and each row has its own random numbers, so one process finds the same as several,
however the rows are spread. Of four processes, each has a part of the generations of a prompt.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.runs.fit import share_cpu_device
from trl_proxy.runs.process import run_script

PROMPTS = [f"{a}{b} " for a in "abcd" for b in "ijkl"]
ROWS = 16  # of a rollout, of all processes
TIMED = ("per_second", "runtime", "time")


class SeededModel(ProxyModelForCausalLM):
    """Draws for a row and a step what one process would draw for them."""

    generations = 0

    def generate(self, *args, **kwargs):
        draws = torch.Generator().manual_seed(self.generations)
        self.generations += 1
        with mock.patch("torch.rand_like", lambda x: _rows_of(torch.rand(ROWS, 32, generator=draws), x)):
            return super().generate(*args, **kwargs)


def _rows_of(draws: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    first = int(os.environ.get("RANK", "0")) * len(logits)
    return draws[first : first + len(logits), : logits.shape[1]]


class HalvedTrainer(ProxyPPOTrainer):
    """The later half of the first rollout's rows has no decisions, so some processes have none."""

    rollouts = 0

    def _generate_single_turn(self, prompt_ids, *args):
        ids = super()._generate_single_turn(prompt_ids, *args)
        self.rollouts += 1
        if self.rollouts == 1:
            rows = self.accelerator.process_index * len(ids) + torch.arange(len(ids))
            has_decisions = (rows < ROWS // 2)[:, None]
            self._rollout = self._rollout._replace(mask=self._rollout.mask & has_decisions)
        return ids


class Recorder(TrainerCallback):
    """Keeps the gradient of each update."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameters = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped).proxy.named_parameters()
        self.gradients.append({name: p.grad.tolist() for name, p in parameters})


def decisions_of(rollout: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """What each decision of a rollout was worth, row by row."""
    mask = rollout["action_mask"]
    of_each = {name: rollout[name][mask].tolist() for name in ("advantages_per_step", "returns", "state_values")}
    return {**of_each, "counts": mask.sum(-1).tolist()}


def main(lm_folder: str, proxy_folder: str, output_dir: str, world: int = 1) -> dict:
    """The findings, the same on every process."""
    scored, rank = [], int(os.environ.get("RANK", "0"))

    def upper_case(prompts, completions, **kwargs):
        rewards = [float(sum(c.isupper() for c in text)) for text in completions]
        scored.extend(zip(prompts, completions, rewards, strict=True))
        return rewards

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_pretrained(lm_folder, dtype=torch.float64)
    lm.register_parameter("rank", torch.nn.Parameter(torch.tensor(float(rank))))
    model = SeededModel(lm, ProxyConfig(p_t=0.001, gate_hidden_sizes=[8], initial_accept_bias=0.5))
    for x in [*model.proxy.parameters(), *model.proxy.buffers()]:
        x.data = x.data.double()
    # Decoding takes float32.
    model.proxy.accept_logits = lambda features, rows: model.gate(features).float()
    # Proxies that are not trained.
    model.load_proxy(proxy_folder, "second")
    model.add_weighted_proxy(["default", "second"], [0.5, 0.5], "both")
    args = ProxyPPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=ROWS // 2 // world,
        per_device_eval_batch_size=4 // world,
        steps_per_generation=2,
        gradient_accumulation_steps=2,  # an update learns from a whole rollout, however it was shuffled
        num_iterations=2,
        num_generations=8,
        replay_rollouts=2,
        max_completion_length=8,
        max_steps=4,
        optim="sgd",
        learning_rate=3.0,
        max_grad_norm=0.0,  # the gradient as it is
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    share_cpu_device(args)
    loaded = [p.data_ptr() for p in lm.parameters()]
    recorder = Recorder()
    recorder.trainer = trainer = HalvedTrainer(
        model=model,
        reward_funcs=upper_case,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(lm_folder, padding_side="left"),
        callbacks=[recorder],
    )
    trainer.train()
    ignored = getattr(trainer.model_wrapped, "parameters_to_ignore", set())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    found = {
        "device": str(trainer.accelerator.device),
        "wrapper": type(trainer.model_wrapped).__name__,
        "lm": gather_object([(lm.rank.item(), loaded == [p.data_ptr() for p in lm.parameters()])]),
        "broadcast": [n for n, _ in [*model.named_parameters(), *model.named_buffers()] if n not in ignored],
        "optimized": [name for name, p in model.named_parameters() if id(p) in optimized],
        "rewards": [reward for *_, reward in gather_object(scored)],
        "table": len(trainer._logs["completion"]),
        "learned_from": gather_object([[decisions_of(rollout) for rollout in trainer._replay.rollouts]]),
        "gradients": recorder.gradients,
        "proxies": gather_object([{name: x.tolist() for name, x in model.proxy.state_dict().items()}]),
        "log": [
            {key: x for key, x in entry.items() if not key.endswith(TIMED)}
            for entry in trainer.state.log_history
            if "reward" in entry
        ],
    }
    # A gate that rejects; five prompts leave an uneven last batch.
    torch.nn.init.normal_(model.gate.mlp[-1].weight, generator=torch.Generator().manual_seed(0))
    for generations in (1, 4):
        scored.clear()
        trainer.num_generations_eval = generations
        metrics = trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:5]}))
        found[f"evaluation_{generations}"] = {key: x for key, x in metrics.items() if not key.endswith(TIMED)}
        found[f"scored_{generations}"] = {text: completion for text, completion, _ in gather_object(scored)}
        stream = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in PROMPTS[:5]))
        metrics = trainer.evaluate(stream)
        found[f"streamed_{generations}"] = {key: x for key, x in metrics.items() if not key.endswith(TIMED)}
    return found


def write(lm_folder: str, proxy_folder: str, output_dir: str) -> None:
    found = main(lm_folder, proxy_folder, output_dir, int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        (Path(output_dir) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_script("ranks", lambda: write(*sys.argv[1:]))
