"""Peak memory of ways to run an LM, each in fresh processes."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig

from eval.speed import (
    MEMORY,
    PROXIES,
    BenchmarkArguments,
    prompts_of_length,
)
from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.devices import best_device
from trl_proxy.loading import load_lm
from trl_proxy.runs.arguments import to_device

MEMORY_PROCESSES = 5
SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
PRECISIONS = (False, True)  # whether the LM is in 4 bit


def peak_memory(args: BenchmarkArguments) -> int | None:
    """Peak bytes of `args.memory` above what the process had before it loaded the LM; None if the system does not
    tell."""
    batch_size, prompt, new_tokens = args.batch_sizes[-1], args.prompt_tokens[0], args.new_tokens[0]
    before = _status("VmRSS")
    quantization = None
    if args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=args.dtype
        )
    device = best_device()
    lm, tokenizer = load_lm(args.model_name_or_path, dtype=args.dtype, quantization_config=quantization, device=device)
    lm = to_device(lm, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _forget_peak()
    ids = prompts_of_length(tokenizer, batch_size, prompt).to(lm.device)
    if args.memory == "train":
        with tempfile.TemporaryDirectory() as folder:
            settings = ProxyPPOConfig(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                num_generations=1,
                steps_per_generation=1,
                max_completion_length=new_tokens,
                max_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=device.type == "cpu",
                bf16=False,
            )
            trainer = ProxyPPOTrainer(
                ProxyModelForCausalLM(lm, ProxyConfig()),
                reward_funcs=lambda prompts, completions, **_: [float(len(x)) for x in completions],
                args=settings,
                train_dataset=Dataset.from_dict({"prompt": tokenizer.batch_decode(ids)}),
                processing_class=tokenizer,
            )
            trainer.train()
    else:
        options = {"max_new_tokens": new_tokens, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
        if args.memory == "generate":
            lm.generate(ids, do_sample=True, top_k=0, **options)
        else:
            ProxyModelForCausalLM(lm, PROXIES[args.memory]).generate(ids, gate_sample=True, **options)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = _status("VmHWM")
    return None if before is None or peak is None else peak - before


def _status(key: str) -> int | None:
    """A figure of Linux's /proc/self/status, in bytes."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))
    except (OSError, StopIteration):
        return None


def _forget_peak() -> None:
    """Resets the peak: loading needs more than decoding, and only decoding counts."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def measure_memory(args: BenchmarkArguments, found: dict[str, int | None]) -> Iterator[None]:
    """Adds the peak bytes of each way of running: the median of several fresh processes, because heaps differ. Yields
    after each way."""
    for four_bit in PRECISIONS[:1] if args.quick else PRECISIONS:
        for way in MEMORY:
            name = f"{way}{', 4 bit' if four_bit else ''}"
            if name in found or (args.quick and way == "candidate"):
                continue
            command = [sys.executable, str(SCRIPT), "--memory", way, "--load_in_4bit", str(four_bit)]
            command += ["--model_name_or_path", args.model_name_or_path, "--dtype", args.dtype]
            command += ["--batch_sizes", str(args.batch_sizes[-1]), "--prompt_tokens", str(args.prompt_tokens[0])]
            command += ["--new_tokens", str(args.new_tokens[0])]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            peaks = []
            for _ in range(1 if args.quick else MEMORY_PROCESSES):
                child = subprocess.run(command, capture_output=True, text=True, env=environment)
                if child.returncode:
                    raise ValueError(f"the memory of {way} could not be measured: {child.stderr.strip()[-500:]}")
                peaks.append(json.loads(child.stdout.strip().splitlines()[-1]))
            found[name] = None if None in peaks else statistics.median(peaks)
            yield
