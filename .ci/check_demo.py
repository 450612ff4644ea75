"""Checks what the shortened demo of `.ci/run` left: python .ci/check_demo.py <output folder> <its log> <cache>."""

import json
import math
import re
import sys
from pathlib import Path

out, log, cache = map(Path, sys.argv[1:])
records = {r["method"]: r for r in (json.loads(path.read_text("utf-8")) for path in (out / "records").glob("*.json"))}
assert set(records) == {"sft", "proxy"}, set(records)
sft, proxy = records["sft"], records["proxy"]
for record in records.values():
    assert record["n_prompts"] == len(record["rewards"]) == len(record["responses"]) == 16, record["method"]
    assert all(map(math.isfinite, record["rewards"])), record["method"]
    assert all(isinstance(text, str) and text for text in record["responses"]), record["method"]
assert 0 < proxy["trainable_parameters"] < 0.01 * proxy["total_parameters"]
assert sft["trainable_parameters"] == 0
assert proxy["episodes"] == 128
assert abs(proxy["delta_vs_sft"] - (proxy["reward_mean"] - sft["reward_mean"])) < 1e-6
assert proxy["lm_forwards_per_token"] == 1.0

results = json.loads((out / "proxy" / "train_results.json").read_text("utf-8"))
assert (results["steps"], results["num_processes"]) == (32, 2), results
logged = [json.loads(line) for line in (out / "proxy" / "log.jsonl").read_text("utf-8").splitlines()]
assert [entry["step"] for entry in logged if "reward" in entry] == [16, 32]
assert [entry["step"] for entry in logged if "eval_reward" in entry] == [16, 32]
for name in ("proxy_model.safetensors", "proxy_config.json", "README.md"):
    assert (out / "proxy" / name).is_file(), name
assert (out / "report.md").stat().st_size > 1000
assert (out / "report.html").stat().st_size > 100_000

# The LM was converted here, once, and nothing is left beside it.
assert len([path for path in cache.iterdir() if path.suffix != ".lock"]) == 1, list(cache.iterdir())
text = log.read_text("utf-8")
assert text.count("Converting the embedded LM into") == 1
lines = [line for line in re.split(r"[\n\r]", text) if line.startswith("step ")]
assert len(lines) == 4, lines
assert all("left" in line and "reward" in line and "accepted" in line for line in lines), lines
assert text.count("\nthe LM ") == text.count("\nproxy  ") == 3
assert text.rstrip().splitlines()[-1].startswith("Ask it: ")
for noise in ("Warning", "kernels-community", "Traceback", "Loading weights", "{'loss'"):
    assert noise not in text, noise
print("The shortened demo left what it should.")
