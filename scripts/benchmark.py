"""Speed and memory of gated decoding beside the LM's own `generate`, interleaved in one run.

    python scripts/benchmark.py --output_dir outputs/benchmark          # over an hour on two CPU cores with bfloat16
    python scripts/benchmark.py --quick --output_dir outputs/benchmark  # under five minutes

In every cell of a grid (rows of the batch, prompt length, new tokens, share of decisions that reject) all methods
decode the same prompts in turn, several times; a ratio is the median over the rounds of tokens a second over plain
sampling's in the same round. Ratios are what counts: absolute figures depend on the machine and its load. Peak memory
is that of fresh processes for each way of running, the interpreter and its libraries left out. What an interrupted run
has measured is kept: the same command goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import BitsAndBytesConfig, DynamicCache, HfArgumentParser, set_seed

from baselines.policy import LAST_POSITION
from eval.harness import package_versions
from eval.plots import plot_benchmark
from eval.report import print_table
from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.defaults import EMBEDDED, load_lm, load_prompts
from trl_proxy.files import write_text
from trl_proxy.gate import decide
from trl_proxy.runs import run_script
from trl_proxy.taps import HiddenTap

PLAIN = "generate, sampled"
CONFIGS = {
    "prefix": ProxyConfig(),
    "prefix, as in training": ProxyConfig(pooled_features=True),
    "candidate": ProxyConfig(features="candidate"),
}
MEMORY = ("generate", "prefix", "candidate", "train")
MEMORY_PROCESSES = 5
PRECISIONS = (False, True)  # whether the LM is in 4 bit


@dataclass
class BenchmarkArguments:
    """What is decoded, and how often."""

    model_name_or_path: str = field(default=EMBEDDED, metadata={"help": "`embedded`, a folder or a hub id."})
    dtype: str = field(
        default="auto", metadata={"help": "Of the LM: by default bfloat16, or float32 on a CPU that would emulate it."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "The last is the base."})
    prompt_tokens: list[int] = field(default_factory=lambda: [128, 16, 512], metadata={"help": "The first: base."})
    new_tokens: list[int] = field(default_factory=lambda: [32, 128], metadata={"help": "The first is the base."})
    reject_rates: list[float] = field(
        default_factory=lambda: [0.3, 0.0, 0.15, 0.45, 0.6], metadata={"help": "The first is the base."}
    )
    rounds: int = field(default=5, metadata={"help": "Rounds over all methods of a cell, after a short warm-up."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of torch; its own default if not set."})
    quick: bool = field(default=False, metadata={"help": "Short prompts, the smallest and the largest batch alone."})
    memory: str | None = field(
        default=None, metadata={"help": f"Only the peak memory of one of {', '.join(MEMORY)}, in this process."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "For --memory: the LM in 4 bit."})
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "Where benchmark.json and the plot go."})

    def __post_init__(self):
        """Raises `ValueError` naming the argument, its value and what is allowed."""
        for name in ("batch_sizes", "prompt_tokens", "new_tokens"):
            if not self.__dict__[name] or min(self.__dict__[name]) < 1:
                raise ValueError(f"--{name} must be numbers of at least 1, got {self.__dict__[name]}.")
        if not self.reject_rates or not all(0.0 <= rate < 1.0 for rate in self.reject_rates):
            raise ValueError(f"--reject_rates must lie in [0, 1), got {self.reject_rates}.")
        if self.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {self.rounds}.")
        if self.memory not in (None, *MEMORY):
            raise ValueError(f"--memory must be one of {', '.join(MEMORY)}, got {self.memory!r}.")


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    reject_rate: float


def grid(args: BenchmarkArguments) -> list[Cell]:
    """The base cell, and every cell that differs from it in one thing."""
    if args.quick:
        base = Cell(max(args.batch_sizes), min(args.prompt_tokens), min(args.new_tokens), args.reject_rates[0])
        return [base, Cell(**{**asdict(base), "batch_size": min(args.batch_sizes)})]
    base = Cell(args.batch_sizes[-1], args.prompt_tokens[0], args.new_tokens[0], args.reject_rates[0])
    axes = {
        "batch_size": args.batch_sizes,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "reject_rate": args.reject_rates,
    }
    cells = [Cell(**{**asdict(base), name: value}) for name, values in axes.items() for value in values]
    return list(dict.fromkeys([base, *cells]))


def prompts_of_length(tokenizer, batch_size: int, length: int) -> torch.Tensor:
    """Token ids `(batch, length)` of running text: the test prompts one after another."""
    text = " ".join(prompt[-1]["content"] for prompt in load_prompts(EMBEDDED, "test")["prompt"])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids.repeat(-(-batch_size * length // len(ids)))[: batch_size * length].view(batch_size, length)


@torch.no_grad()
def serial_decode(model: ProxyModelForCausalLM, input_ids: torch.Tensor, new_tokens: int) -> tuple[int, int]:
    """The per-candidate loop at batch 1 that MARA describes (arXiv 2505.19743): top-k 40 and top-p 0.95 proposals in
    descending probability, one forward of the LM for each, the cache cut back after a rejection.

    Returns:
        tokens written and forwards of the LM.
    """
    lm, cache, forwards = model.lm, DynamicCache(config=model.lm.config), 1
    logits = lm(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
    with HiddenTap(lm) as tap:
        for _ in range(new_tokens):
            probabilities, token_ids = logits.float().softmax(-1).topk(min(40, len(logits)))
            keep = probabilities.cumsum(0) - probabilities < 0.95
            token_ids = token_ids[keep]
            for rank, token in enumerate(token_ids):
                logits = lm(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1]
                forwards += 1
                accept = decide(model.gate(model.gate_features(tap.hidden[:, -1])), 0.0, sample=True)
                if accept or rank + 1 == len(token_ids):
                    break
                cache.crop(-1)
    return new_tokens, forwards


def methods_of(cell: Cell, models: dict[str, ProxyModelForCausalLM], ids: torch.Tensor) -> dict[str, Callable]:
    """Name -> a function of the number of new tokens that returns tokens written and forwards of the LM, per row."""
    lm = models["prefix"].lm
    # No end-of-sequence: every method then writes the same number of tokens.
    shared = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}

    def plain(repeats: int = 1, **options):
        def run(new_tokens: int) -> tuple[int, int]:
            lm.generate(ids, max_new_tokens=new_tokens, num_return_sequences=repeats, top_k=0, **options, **shared)
            return new_tokens * len(ids), new_tokens * len(ids) * repeats

        return run

    def gated(name: str, **options):
        def run(new_tokens: int) -> tuple[int, int]:
            decisions = (
                models[name]
                .generate(
                    ids,
                    max_new_tokens=new_tokens,
                    gate_sample=True,
                    return_dict_in_generate=True,
                    **options,
                    **shared,
                )
                .decisions
            )
            return int(decisions.tokens.sum()), int(decisions.lm_forwards.sum())

        return run

    methods = {
        PLAIN: plain(do_sample=True),
        "generate, greedy": plain(do_sample=False),
        "generate, sampled, contiguous head": plain(do_sample=True, logits_to_keep=LAST_POSITION),
        "prefix": gated("prefix"),
        "prefix, as in training": gated("prefix, as in training", output_rollout=True),
        "candidate, one by one": gated("candidate", tree=False),
    }
    if cell.batch_size <= 8:
        methods["candidate, tree"] = gated("candidate", tree=True)
        methods["best of 4"] = plain(4, do_sample=True)
    if cell.batch_size == 1:
        methods["best of 32"] = plain(32, do_sample=True)
        methods["candidate, serial loop"] = lambda new_tokens: serial_decode(models["candidate"], ids, new_tokens)
    return methods


def measure(cell: Cell, models: dict, tokenizer, rounds: int, progress: tqdm) -> dict:
    """All methods of a cell: `{name: {tokens_per_second, ratio, ratio_min, ratio_max, lm_forwards_per_token}}`."""
    logit = math.log((1 - cell.reject_rate) / cell.reject_rate) if cell.reject_rate else 100.0
    for model in models.values():
        torch.nn.init.constant_(model.gate.mlp[-1].bias, logit)
    ids = prompts_of_length(tokenizer, cell.batch_size, cell.prompt_tokens).to(models["prefix"].lm.device)
    methods = methods_of(cell, models, ids)
    speeds, forwards = ({name: [] for name in methods} for _ in range(2))
    for i in range(rounds + 1):
        for name, run in methods.items():
            progress.set_postfix_str(f"batch {cell.batch_size}, {name}")
            started = time.perf_counter()
            tokens, lm_forwards = run(cell.new_tokens if i else 2)
            if i:
                speeds[name].append(tokens / (time.perf_counter() - started))
                forwards[name].append(lm_forwards / tokens)
        progress.update()
    results = {}
    for name in methods:
        ratios = [x / y for x, y in zip(speeds[name], speeds[PLAIN])]
        results[name] = {
            "tokens_per_second": statistics.median(speeds[name]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "lm_forwards_per_token": statistics.median(forwards[name]),
        }
    return results


# Memory


def peak_memory(args: BenchmarkArguments) -> int | None:
    """Bytes that `args.memory` needs at most beyond what the process had before it loaded the LM; None where the
    system does not tell."""
    batch_size, prompt, new_tokens = args.batch_sizes[-1], args.prompt_tokens[0], args.new_tokens[0]
    before = _status("VmRSS")
    quantization = None
    if args.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=args.dtype
        )
    lm, tokenizer = load_lm(args.model_name_or_path, dtype=args.dtype, quantization_config=quantization)
    if torch.cuda.is_available():
        lm.to("cuda")
        torch.cuda.reset_peak_memory_stats()
    _forget_peak()
    ids = prompts_of_length(tokenizer, batch_size, prompt).to(lm.device)
    if args.memory == "train":
        with tempfile.TemporaryDirectory() as folder:
            settings = ProxyPPOConfig(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                steps_per_generation=1,
                max_completion_length=new_tokens,
                max_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
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
            ProxyModelForCausalLM(lm, CONFIGS[args.memory]).generate(ids, gate_sample=True, **options)
    if torch.cuda.is_available():
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
    """Loading needs more than decoding; what counts is decoding."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def measure_memory(args: BenchmarkArguments, found: dict[str, int | None]) -> Iterator[None]:
    """Adds peak bytes by way of running, each the median of some fresh processes, whose heaps differ; yields after
    each."""
    for four_bit in PRECISIONS[:1] if args.quick else PRECISIONS:
        for way in MEMORY:
            name = f"{way}{', 4 bit' if four_bit else ''}"
            if name in found or (args.quick and way == "candidate"):
                continue
            command = [sys.executable, __file__, "--memory", way, "--load_in_4bit", str(four_bit)]
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


# Results


def summarise(cells: list[dict], memory: dict[str, int | None]) -> dict[str, float | None]:
    """The figures to watch from one version to the next, by name."""
    first = cells[0]  # the base; the smallest batch is the other end
    small = min(cells, key=lambda cell: cell["batch_size"])
    b1, b32 = small["batch_size"], first["batch_size"]
    big, little = first["methods"], small["methods"]
    candidate = big["candidate, one by one"]
    ratios = {
        f"prefix_vs_generate_b{b32}": big["prefix"]["ratio"],
        f"prefix_vs_generate_b{b1}": little["prefix"]["ratio"],
        f"candidate_efficiency_b{b32}": candidate["ratio"] * candidate["lm_forwards_per_token"],
    }
    if b1 == 1:
        serial, tree = little["candidate, serial loop"], little["candidate, tree"]
        ratios |= {
            "tree_vs_generate_b1": tree["ratio"],
            "tree_vs_serial_b1": tree["tokens_per_second"] / serial["tokens_per_second"],
            f"batched_vs_serial_b{b32}": candidate["tokens_per_second"] / serial["tokens_per_second"],
        }
    for suffix in ("", ", 4 bit"):
        plain = memory.get("generate" + suffix)
        for key, ways in (("decode", ("prefix", "candidate")), ("train", ("train",))):
            peaks = [memory[way + suffix] for way in ways if memory.get(way + suffix)]
            if plain and peaks:
                ratios[f"peak_memory_{key}{'_4bit' if suffix else ''}"] = max(peaks) / plain
    return ratios


def print_tables(cells: list[dict], memory: dict, ratios: dict) -> None:
    """One table per cell, then memory and the summary."""
    for cell in cells:
        print("batch {batch_size}, prompt {prompt_tokens}, new {new_tokens}, reject rate {reject_rate}".format(**cell))
        rows = [
            [
                name,
                f"{r['tokens_per_second']:.1f}",
                f"{r['ratio']:.2f}",
                f"{r['ratio_min']:.2f} to {r['ratio_max']:.2f}",
                f"{r['lm_forwards_per_token']:.2f}",
                f"{r['ratio'] * r['lm_forwards_per_token']:.2f}",
            ]
            for name, r in cell["methods"].items()
        ]
        print_table(["method", "tokens/s", f"x {PLAIN}", "range", "LM forwards/token", "x per forward"], rows)
    peaks = [[way, "not known" if peak is None else f"{peak / 2**20:.0f}"] for way, peak in memory.items()]
    print_table(["peak memory", "MiB"], peaks)
    print_table(["summary", "ratio"], [[name, f"{ratio:.2f}"] for name, ratio in ratios.items()])


def main(args: BenchmarkArguments) -> dict:
    """Times all methods, measures memory, writes `<output_dir>/benchmark.json` and draws `benchmark.png`."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        peak = peak_memory(args)
        print(json.dumps(peak))
        return {"memory": peak}
    set_seed(0)
    lm, tokenizer = load_lm(args.model_name_or_path, dtype=args.dtype)
    args.dtype = str(lm.dtype).removeprefix("torch.")
    if torch.cuda.is_available():
        lm.to("cuda")
    models = {name: ProxyModelForCausalLM(lm, config) for name, config in CONFIGS.items()}
    settings = {"arguments": asdict(args), "threads": torch.get_num_threads(), "versions": package_versions()}
    path = os.path.join(args.output_dir, "benchmark.json")
    unfinished = path + ".unfinished"
    results = _read_unfinished(unfinished, settings) or {**settings, "cells": [], "memory": {}}
    cells, memory = results["cells"], results["memory"]
    points = grid(args)[len(cells) :]
    with tqdm(total=len(points) * (args.rounds + 1), desc="rounds", unit="round") as progress:
        for cell in points:
            cells.append({**asdict(cell), "methods": measure(cell, models, tokenizer, args.rounds, progress)})
            write_text(unfinished, json.dumps(results, indent=1))
    for _ in measure_memory(args, memory):
        write_text(unfinished, json.dumps(results, indent=1))
    results["ratios"] = summarise(cells, memory)
    write_text(path, json.dumps(results, indent=1))
    os.remove(unfinished)
    print_tables(cells, memory, results["ratios"])
    if not args.quick:
        print(plot_benchmark(cells, os.path.join(args.output_dir, "benchmark")))
    return results


def _read_unfinished(path: str, settings: dict) -> dict | None:
    """What a run with the same settings had measured when it was interrupted."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        results = json.load(file)
    return results if all(results[key] == value for key, value in settings.items()) else None


if __name__ == "__main__":
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__.partition("\n")[0])
    run_script("benchmark", lambda: main(*parser.parse_args_into_dataclasses()), goes_on=True)
