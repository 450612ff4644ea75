"""One update of a proxy by every process of `accelerate launch`, and what it found out, for test_scale.py.

Arguments: the folder of a tiny LM with its tokenizer, and the output folder, which gets `found.json`.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.runs.fit import share_cpu_device
from trl_proxy.runs.process import run_script

PROMPTS = [f"{a}{b} " for a in "abcd" for b in "ijkl"]


class RecordingTrainer(ProxyPPOTrainer):
    """Keeps what the last update learns from."""

    def _compute_loss(self, model, inputs):
        if self.model.training:
            self.learnt_from = inputs
        return super()._compute_loss(model, inputs)


class CompareGradients(TrainerCallback):
    """Compares the gradient of an update with that of one process which has the parts of all, as micro-batches."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer, model = self.trainer, self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        parameters = {name: p for name, p in model.named_parameters() if p.grad is not None}
        parts = gather_object([trainer.learnt_from])
        expected = [torch.zeros_like(p) for p in parameters.values()]
        for part in parts:
            loss = trainer._compute_loss(model, part)  # the bare model: nothing is averaged
            for total, grad in zip(expected, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                total += grad / len(parts)
        errors = [(p.grad - grad).abs().max().item() for p, grad in zip(parameters.values(), expected, strict=True)]
        ignored = getattr(trainer.model_wrapped, "parameters_to_ignore", set())
        self.found = {
            "wrapper": type(trainer.model_wrapped).__name__,
            "gradients": {name: p.grad.abs().max().item() for name, p in parameters.items()},
            "gradient_error": max(errors),
            "decisions": [int(part["action_mask"].sum()) for part in parts],
            "broadcast": [
                name for name, _ in [*model.named_parameters(), *model.named_buffers()] if name not in ignored
            ],
        }


def main(lm_folder: str, output_dir: str, world_size: int = 2) -> dict:
    """The findings, the same on every process."""
    scored = []

    def upper_case(prompts, completions, **kwargs):
        rewards = [float(sum(c.isupper() for c in text)) for text in completions]
        scored.extend(zip(prompts, completions, rewards, strict=True))
        return rewards

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_pretrained(lm_folder)
    model = ProxyModelForCausalLM(lm, ProxyConfig(p_t=0.001, gate_hidden_sizes=[8]))
    args = ProxyPPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8 // world_size,
        per_device_eval_batch_size=4 // world_size,
        steps_per_generation=1,
        num_iterations=1,
        num_generations=1,
        max_completion_length=8,
        max_steps=1,
        max_grad_norm=0.0,  # the gradient as it is
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    share_cpu_device(args)
    loaded = [p.data_ptr() for p in lm.parameters()]
    compare = CompareGradients()
    compare.trainer = trainer = RecordingTrainer(
        model=model,
        reward_funcs=upper_case,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(lm_folder, padding_side="left"),
        callbacks=[compare],
    )
    found = {"device": str(trainer.accelerator.device)}

    # Were the LM broadcast, the other processes' would become the first one's.
    head = lm.get_output_embeddings().weight.data
    original = head.clone()
    head[5] += 0.125 * trainer.accelerator.process_index
    before, untrained = head.clone(), copy.deepcopy(model.proxy.state_dict())
    scored.clear()
    trainer.train()
    found["lm_is_unchanged"] = gather_object([torch.equal(before, lm.get_output_embeddings().weight)])
    found["lm_stays"] = gather_object([loaded == [p.data_ptr() for p in lm.parameters()]])
    found["rewards"] = [reward for *_, reward in gather_object(scored)]
    found["table"] = len(trainer._logs["completion"])
    found["log"] = next(entry for entry in trainer.state.log_history if "reward" in entry)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    found["optimized"] = [name for name, p in model.named_parameters() if id(p) in optimized]
    found["proxies"] = gather_object([[x.tolist() for x in model.proxy.state_dict().values()]])

    # Greedy decisions of a gate that rejects are the same whoever makes them.
    lm.get_output_embeddings().weight.data.copy_(original)
    model.proxy.load_state_dict(untrained)
    torch.nn.init.normal_(model.gate.mlp[-1].weight, generator=torch.Generator().manual_seed(0))
    for name, count in (("even", 8), ("uneven", 5)):
        scored.clear()
        metrics = trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:count]}))
        timed = ("per_second", "runtime", "time")
        found[name] = {key: x for key, x in metrics.items() if not key.endswith(timed)}
        found[f"{name}_scored"] = {prompt: reward for prompt, _, reward in gather_object(scored)}
    return {**found, **compare.found}


def write(lm_folder: str, output_dir: str) -> None:
    found = main(lm_folder, output_dir)
    if os.environ["RANK"] == "0":
        (Path(output_dir) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_script("two_ranks", lambda: write(*sys.argv[1:]))
