"""How often the preference reward orders a held-out pair as people do, and its card."""

import json
import math
import shlex
import sys
from pathlib import Path

import torch
from scipy.stats import binomtest

from trl_proxy.rewards.preference import (
    REWARD_CONFIG_NAME,
    PreferenceReward,
)
from trl_proxy.rewards.training import (
    CUT_WORDS,
    RewardTrainingArguments,
    ScriptArguments,
    first_words,
    heldout_prompts,
    load_pairs,
    load_router_prompts,
    train_adapter,
    train_router,
)


def accuracy(right: torch.Tensor) -> dict:
    """Share of right pairs (a tie is half right) with its 95 % Wilson interval; null if there is no pair."""
    if len(right) == 0:
        return {"accuracy": None, "ci95": None, "n": 0}
    interval = binomtest(round(right.sum().item()), len(right)).proportion_ci(method="wilson")
    return {"accuracy": right.mean().item(), "ci95": [interval.low, interval.high], "n": len(right)}


def wins(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first > second).float() + 0.5 * (first == second).float()


def word_counts(rows: list[dict], key: str) -> torch.Tensor:
    return torch.tensor([float(len(row[key].split())) for row in rows])


def evaluate(folder: str, config: dict, train: dict, heldout: dict, own_prompts: dict, batch_size: int) -> dict:
    """Scores the held-out pairs with the saved reward, fills mean and std into `config` and returns the metrics."""
    names = list(heldout)
    reward = PreferenceReward.from_pretrained(
        folder, side="balanced" if len(names) == 2 else names[0], batch_size=batch_size
    )

    def score(rows, key, n_words=None):
        responses = [first_words(row[key], n_words) if n_words else row[key] for row in rows]
        return {name: reward.score(name, [row["prompt"] for row in rows], responses) for name in names}

    keys = ("chosen", "rejected")
    scores = {name: {key: score(rows, key) for key in keys} for name, rows in heldout.items()}
    cut_scores = {name: {key: score(rows, key, CUT_WORDS) for key in keys} for name, rows in heldout.items()}
    # z-scored over the responses of the output's own source: it was trained on them, and the router uses it for them
    for name, output in config["outputs"].items():
        own = torch.cat([scores[name][key][name] for key in keys])
        output["mean"], output["std"] = own.mean().item(), own.std().item()
        for by_key in (*scores.values(), *cut_scores.values()):
            for values in by_key.values():
                values[name] = (values[name] - output["mean"]) / output["std"]
    metrics = {}
    if len(names) == 2:
        routed = {name: reward.route([row["prompt"] for row in rows]) for name, rows in heldout.items()}
        for name, by_key in (*scores.items(), *cut_scores.items()):
            for values in by_key.values():
                w = routed[name]
                values["balanced"] = w * values[names[0]] + (1 - w) * values[names[1]]
        everything = torch.cat([values["balanced"] for by_key in scores.values() for values in by_key.values()])
        config["balanced"] = {"outputs": names, "mean": everything.mean().item(), "std": everything.std().item()}
        route = routed | {f"{name}, own prompts": reward.route(prompts) for name, prompts in own_prompts.items()}
        metrics["router"] = {
            name: {**accuracy((w > 0.5 if name.startswith(names[0]) else w < 0.5).float()), "mean_w": w.mean().item()}
            for name, w in route.items()
        }
    for name, rows in heldout.items():
        train_counts = [word_counts(train[name], key) for key in keys]
        sign = 1 if wins(*train_counts).mean() > 0.5 else -1
        chosen, rejected = (word_counts(rows, key) for key in keys)
        # Length-matched: the word counts differ by less than 25 %; one is added so that empty responses count
        matched = ((chosen + 1) / (rejected + 1)).log().abs() < math.log(1.25)
        by_length = wins(sign * chosen, sign * rejected)
        rule = "longer wins" if sign == 1 else "shorter wins"
        baseline = {"rule": rule, "all": accuracy(by_length), "length_matched": accuracy(by_length[matched])}
        by_length = wins(*(sign * counts.clamp(max=CUT_WORDS) for counts in (chosen, rejected)))
        metrics[name] = {"length_baseline": baseline | {"first_words": accuracy(by_length)}}
        for side in scores[name]["chosen"]:
            right = wins(scores[name]["chosen"][side], scores[name]["rejected"][side])
            first = wins(cut_scores[name]["chosen"][side], cut_scores[name]["rejected"][side])
            metrics[name][side] = {
                "all": accuracy(right),
                "length_matched": accuracy(right[matched]),
                "first_words": accuracy(first),
            }
    return metrics


def public_command() -> str:
    """This run's command, with absolute paths cut down to their last part and the description left out."""

    def shorten(argument):
        return "=".join(Path(part).name if part.startswith("/") else part for part in argument.split("="))

    arguments = ["..." if " " in argument else shorten(argument) for argument in sys.argv[1:]]
    return shlex.join(["python", "scripts/train_reward.py", *arguments])


def write_card(script_args, args, config: dict, metrics: dict, train: dict[str, list]) -> None:
    """README.md next to the adapter: data, command, accuracies with intervals and the length baseline, limits."""

    def cell(value):
        if value["n"] == 0:
            return "no such pair"
        return f"{value['accuracy']:.3f} [{value['ci95'][0]:.3f}, {value['ci95'][1]:.3f}] (n={value['n']})"

    names = list(train)
    lines = [
        f"| source | score | all held-out pairs | length-matched pairs | first {CUT_WORDS} words of both |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in names:
        for side, value in metrics[name].items():
            label = f"length alone: {value['rule']}" if side == "length_baseline" else side
            cells = [cell(value[pairs]) for pairs in ("all", "length_matched", "first_words")]
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    lines += ["", "| score | mean | standard deviation |", "| --- | --- | --- |"]
    scales = config["outputs"] | ({"balanced": config["balanced"]} if "balanced" in config else {})
    lines += [f"| {name} | {scale['mean']:.4f} | {scale['std']:.4f} |" for name, scale in scales.items()]
    if "router" in metrics:
        lines += ["", f"| prompts | routed to their own side | mean weight of {names[0]} |", "| --- | --- | --- |"]
        lines += [f"| {name} | {cell(value)} | {value['mean_w']:.2f} |" for name, value in metrics["router"].items()]
    card = CARD.format(
        base=script_args.model_name_or_path,
        names=" and ".join(names),
        data=script_args.data_description or "Not described.",
        command=public_command(),
        seed=args.seed,
        max_length=script_args.max_length,
        split_seed=script_args.split_seed,
        cut_share=script_args.cut_share,
        chosen="These pairs chose no setting."
        if script_args.train_on_heldout
        else "The settings were chosen on\nthese pairs, so the figures are slightly optimistic.",
        n_train=" and ".join(f"{len(rows):,} {name}" for name, rows in train.items()),
        tables="\n".join(lines),
    )
    (Path(args.output_dir) / "README.md").write_text(card, encoding="utf-8")


CARD = """---
license: apache-2.0
base_model: {base}
tags: [reward-model, peft, lora, trl-proxy]
---
# Preference reward: {names}
Scores a (prompt, response) pair: LoRA on the frozen encoder `{base}`, trained on one side of human preferences per
output. A logistic router on the frozen encoder's features of the prompt alone weighs the outputs for the `balanced`
score. Scores are z-scored: 1.0 is one standard deviation over the human-rated held-out responses. Load it with
`trl_proxy.rewards.preference.PreferenceReward.from_pretrained(folder, side="balanced")`.

## Data
{data}

Split by prompt, never by row: no held-out prompt occurs in the training pairs of any source.

## Command
```
{command}
```
Seed {seed}, split seed {split_seed}; {n_train} training pairs. In training
{cut_share:.0%} of the pairs are cut, both responses after the same random number of words, so that an unfinished
response is judged by what it says and not by its being short.

## Accuracy on held-out pairs
95 % Wilson intervals. Length-matched: word counts (plus one) differ by less than 25 %. {chosen}

{tables}

## Limits
Single-turn English, at most {max_length} tokens; longer responses are cut off. An output alone is not a reward of good
answers: the harmless one prefers refusals and evasions even to everyday questions, the helpful one prefers compliance
even with harmful requests. Any of them can be gamed by an optimiser; check with another reward and read samples.
Not a safety filter. Licence of the adapter: Apache-2.0.
"""


def train_reward(script_args: ScriptArguments, args: RewardTrainingArguments) -> None:
    locations = dict(source.split("=", 1) for source in script_args.sources)
    if len(locations) not in (1, 2):
        raise ValueError(f"`sources` must be one or two of `name=location`, got {script_args.sources}.")
    rows = {name: load_pairs(location) for name, location in locations.items()}
    drawn = {name: heldout_prompts(r, script_args.n_heldout, script_args.split_seed) for name, r in rows.items()}
    all_drawn = set().union(*drawn.values())
    heldout = {name: [row for row in r if row["prompt"] in drawn[name]] for name, r in rows.items()}
    train = {name: [row for row in r if row["prompt"] not in all_drawn] for name, r in rows.items()}
    if script_args.train_on_heldout:
        train, heldout = heldout, train
    for name in rows:
        print(f"{name}: {len(train[name])} training and {len(heldout[name])} held-out pairs")

    for name in rows:
        train_adapter(train[name], script_args, args, Path(args.output_dir) / name)
    outputs = {name: {"adapter": name, "mean": 0.0, "std": 1.0} for name in rows}
    config = {"base_model": script_args.model_name_or_path, "max_length": script_args.max_length, "outputs": outputs}
    if len(rows) == 2:
        prompts = {name: [row["prompt"] for row in r] for name, r in train.items()}
        own = load_router_prompts(script_args.router_prompts, "train")
        train_router(prompts, own, script_args, args.output_dir)
        config["balanced"] = {"outputs": list(rows), "mean": 0.0, "std": 1.0}
    path = Path(args.output_dir) / REWARD_CONFIG_NAME
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")  # evaluation loads what users will load
    own = load_router_prompts(script_args.router_prompts, "test")
    metrics = evaluate(args.output_dir, config, train, heldout, own, args.per_device_eval_batch_size)
    path.write_text(json.dumps(config | {"metrics": metrics}, indent=2), encoding="utf-8")
    write_card(script_args, args, config, metrics, train)
    print(json.dumps(metrics, indent=2))
