"""A long training holds what it held after its first rollouts: memory, file handles, threads, and room on the disk."""

import gc
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_proxy import PPOConfig, PPOTrainer, ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.runs.arguments import RunArguments
from trl_proxy.runs.fit import fit, prepare_run

PROMPTS = ["abc", "hello there", "x", "why?", "tell me", "no", "yes", "one two"]
STEPS = 2  # of a rollout


class Held(NamedTuple):
    """What a process holds at the end of a rollout."""

    rss: int
    tensor_bytes: int
    objects: int  # new ones, known to the garbage collector, without those of the log
    handles: int
    threads: int
    disk: int  # bytes in the output folder, without the log


class Watch(TrainerCallback):
    """Notes what the process holds after every so many rollouts."""

    def __init__(self, every: int):
        self.every, self.held, self.process = every, [], psutil.Process()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % (self.every * STEPS):
            return
        gc.collect()
        objects = gc.get_objects()
        tensors = {
            x.data_ptr(): x.nbytes for x in objects if isinstance(x, torch.Tensor) and x.layout == torch.strided
        }
        # Each checkpoint has the log so far; both grow by one line per logging step.
        files = [x for x in Path(args.output_dir).rglob("*") if x.is_file()]
        disk = sum(x.stat().st_size for x in files if x.name not in ("log.jsonl", "trainer_state.json"))
        self.held.append(
            Held(
                self.process.memory_info().rss,
                sum(tensors.values()),
                len(objects) - len(state.log_history),
                self.process.num_fds(),
                self.process.num_threads(),
                disk,
            )
        )


@pytest.fixture
def long_run(tmp_path, tiny_lm, tiny_tokenizer):
    """`long_run(method, rollouts, every)` -> what was held after every so many rollouts, and the output folder. It
    evaluates, logs and saves as the scripts do."""

    def run(method: str, rollouts: int, every: int) -> tuple[list[Held], Path]:
        options = {
            "output_dir": str(tmp_path / method),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "steps_per_generation": STEPS,
            "num_iterations": 1,
            "num_generations": 4,
            "max_completion_length": 4,
            "max_steps": rollouts * STEPS,
            "logging_steps": STEPS,
            "save_steps": 8 * STEPS,
            "save_total_limit": 2,
            "eval_strategy": "steps",
            "eval_steps": 8 * STEPS,
            "log_completions": False,
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        }
        shared = {
            "reward_funcs": lambda prompts, completions, **_: [text.count("a") for text in completions],
            "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
            "eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:4]}),
            "processing_class": tiny_tokenizer,
        }
        if method == "proxy":
            model = ProxyModelForCausalLM(tiny_lm(), ProxyConfig(p_t=0.01))
            trainer = ProxyPPOTrainer(model, args=ProxyPPOConfig(**options), **shared)
        else:
            lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = PPOTrainer(tiny_lm(), args=PPOConfig(**options), peft_config=lora, **shared)
        run_args = RunArguments()
        settings, checkpoint = prepare_run(method, run_args, trainer.args)
        watch = Watch(every)
        trainer.add_callback(watch)
        gc.freeze()  # what was there before is not counted, which takes long
        try:
            fit(trainer, settings, run_args, checkpoint)
        finally:
            gc.unfreeze()
        return watch.held, tmp_path / method

    return run


def check_flat(held: list[Held], rollouts: int) -> None:
    """Nothing that is counted grows from the second quarter to the last one, which are half of the rollouts apart."""
    quarter = len(held) // 4
    early, late = held[quarter : 2 * quarter], held[-quarter:]
    for name in ("handles", "threads"):
        assert max(getattr(x, name) for x in late) <= max(getattr(x, name) for x in early), name
    grown = {
        name: statistics.median(getattr(x, name) for x in late) - statistics.median(getattr(x, name) for x in early)
        for name in Held._fields
    }
    assert grown["tensor_bytes"] <= 0.05 * early[0].tensor_bytes, grown
    assert grown["disk"] <= 0.05 * early[-1].disk, grown
    assert grown["objects"] <= 300 + 0.05 * rollouts / 2, grown
    assert grown["rss"] <= 8 * 2**20, grown


def test_a_short_run_holds_no_more_at_its_end(long_run):
    held, folder = long_run("proxy", 48, 2)
    check_flat(held, 48)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert max(map(len, lines)) < 2500
    assert len(list(folder.glob("checkpoint-*"))) == 2
    assert len(json.loads((folder / "trainer_state.json").read_text())["log_history"]) == len(lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["proxy", "ppo"])
def test_a_long_run_holds_no_more_at_its_end(long_run, method):
    """2,000 rollouts; of the LM itself fewer, because they take longer."""
    rollouts = 2000 if method == "proxy" else 500
    held, folder = long_run(method, rollouts, rollouts // 100)
    rss = [x.rss / 2**20 for x in held]
    places = range(25, len(rss))
    slope, _ = statistics.linear_regression(places, rss[25:])
    grown = slope * len(places)
    print(
        f"\n{method}, {rollouts} rollouts: {rss[0]:.0f} MiB at first, {rss[25]:.0f} after a quarter, {rss[-1]:.0f} at "
        f"the end ({grown:+.1f} MiB by regression over three quarters); {held[-1].handles} handles, "
        f"{held[-1].threads} threads, {held[25].disk} and {held[-1].disk} bytes on the disk, log.jsonl "
        f"{(folder / 'log.jsonl').stat().st_size} bytes; {held[25].objects} and {held[-1].objects} objects"
    )
    logged = (folder / "log.jsonl").stat().st_size / 2**20  # the log stays in memory too, as Python's objects
    check_flat(held, rollouts)
    assert grown < 4 + 5 * logged
