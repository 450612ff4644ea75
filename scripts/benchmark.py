"""Speed of gated decoding beside the LM's own `generate`, interleaved in one run.

    python scripts/benchmark.py --output_dir outputs/benchmark

Every method decodes the same prompts in turn, several times; a ratio is the median over the rounds of tokens a second
over plain sampling's in the same round. Ratios are what counts: absolute figures depend on the machine and its load.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

from trl_proxy import ProxyConfig, ProxyModelForCausalLM
from trl_proxy.defaults import EMBEDDED, load_lm, load_prompts


@dataclass
class BenchmarkArguments:
    """What is decoded, and how often."""

    model_name_or_path: str = field(default=EMBEDDED, metadata={"help": "`embedded`, a folder or a hub id."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the LM."})
    batch_size: int = field(default=32, metadata={"help": "Prompts decoded at once."})
    max_new_tokens: int = field(default=32, metadata={"help": "Tokens per response; no end-of-sequence."})
    rounds: int = field(default=7, metadata={"help": "Rounds over all methods, after one to warm up."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of torch; its own default if not set."})
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "Where benchmark.json goes."})


def main(args: BenchmarkArguments) -> dict:
    """Times all methods and writes `<output_dir>/benchmark.json`."""
    if args.threads:
        torch.set_num_threads(args.threads)
    set_seed(0)
    lm, tokenizer = load_lm(args.model_name_or_path, dtype=args.dtype)
    prompts = load_prompts(EMBEDDED, "test")["prompt"][: args.batch_size]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, padding=True, return_tensors="pt"
    ).to(lm.device)
    # No end-of-sequence: every method then writes the same number of tokens.
    shared = {**inputs, "max_new_tokens": args.max_new_tokens, "eos_token_id": None}
    configs = {
        "prefix features": ProxyConfig(),
        "prefix features, pooled": ProxyConfig(pooled_features=True),
        "candidate features": ProxyConfig(features="candidate"),
    }
    models = {name: ProxyModelForCausalLM(lm, config) for name, config in configs.items()}

    def run(name: str) -> tuple[float, float]:
        started = time.perf_counter()
        if name in models:
            output = models[name].generate(**shared, gate_sample=True, output_rollout=True)
            tokens, forwards = (int(x.sum()) for x in (output.decisions.tokens, output.decisions.lm_forwards))
        else:
            output = lm.generate(**shared, do_sample=name == "generate, sampled", top_k=0)
            tokens = forwards = (output.shape[1] - inputs["input_ids"].shape[1]) * len(output)
        return tokens / (time.perf_counter() - started), forwards / tokens

    names = ["generate, sampled", "generate, greedy", *models]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    forwards: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(args.rounds + 1), desc="rounds"):
        for name in names:
            speed, per_token = run(name)
            if i:
                speeds[name].append(speed)
                forwards[name].append(per_token)

    results = {}
    for name in names:
        ratios = [x / y for x, y in zip(speeds[name], speeds["generate, sampled"])]
        per_token = statistics.median(forwards[name])
        results[name] = {
            "tokens_per_second": statistics.median(speeds[name]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "lm_forwards_per_token": per_token,
            "ratio_per_forward": statistics.median(ratios) * per_token,
        }
    table = Table("method", "tokens/s", "x generate, sampled", "range", "LM forwards/token", "x per forward")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r['tokens_per_second']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['ratio_min']:.2f} to {r['ratio_max']:.2f}",
            f"{r['lm_forwards_per_token']:.2f}",
            f"{r['ratio_per_forward']:.2f}",
        )
    Console().print(table)
    os.makedirs(args.output_dir, exist_ok=True)
    with open(os.path.join(args.output_dir, "benchmark.json"), "w", encoding="utf-8") as file:
        json.dump(
            {"arguments": vars(args), "threads": torch.get_num_threads(), "torch": torch.__version__, **results},
            file,
            indent=2,
        )
    return results


if __name__ == "__main__":
    try:
        main(
            *HfArgumentParser(BenchmarkArguments, description=__doc__.partition("\n")[0]).parse_args_into_dataclasses()
        )
    except ValueError as error:
        raise SystemExit(f"benchmark: {error}") from error
