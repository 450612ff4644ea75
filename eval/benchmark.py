"""The benchmark: prints, draws and keeps speed and memory of gated decoding against the LM's own `generate`."""

import json
import os
from dataclasses import asdict

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

from eval.memory import measure_memory, peak_memory
from eval.plots.benchmark import plot_benchmark
from eval.records import package_versions
from eval.report.tables import print_table
from eval.speed import PLAIN, PROXIES, BenchmarkArguments, grid, measure
from trl_proxy import ProxyModelForCausalLM
from trl_proxy.devices import best_device
from trl_proxy.files import write_text
from trl_proxy.loading import load_lm


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


def benchmark(args: BenchmarkArguments) -> dict:
    """Times all methods, measures memory, writes `<output_dir>/benchmark.json` and draws `benchmark.png`."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        peak = peak_memory(args)
        print(json.dumps(peak))
        return {"memory": peak}
    set_seed(0)
    device = best_device()
    lm, tokenizer = load_lm(args.model_name_or_path, dtype=args.dtype, device=device)
    args.dtype = str(lm.dtype).removeprefix("torch.")
    lm.to(device)
    models = {name: ProxyModelForCausalLM(lm, config) for name, config in PROXIES.items()}
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


def make_parser() -> HfArgumentParser:
    return HfArgumentParser(BenchmarkArguments, description=__doc__.partition("\n")[0])
