"""
Trains a preference reward: one LoRA adapter per source of preferences, and a router that tells the sources apart by
the prompt alone. `trl_proxy.rewards.PreferenceReward.from_pretrained` loads what this writes.

The embedded reward, on a CPU (about 20 minutes on one core that multiplies bfloat16 natively; leave out --bf16 on
another):

    python scripts/train_reward.py \
        --sources harmless=hh_harmless.jsonl helpful=hh_helpful.jsonl \
        --router_prompts harmless=trl_proxy/data/prompts.jsonl:harm_adjacent \
            helpful=trl_proxy/data/prompts.jsonl:everyday \
        --output_dir trl_proxy/data/reward --use_cpu --bf16 --seed 0

The same from the hub, with another base model, on a GPU:

    python scripts/train_reward.py \
        --sources harmless=Anthropic/hh-rlhf:harmless-base helpful=Anthropic/hh-rlhf:helpful-base \
        --model_name_or_path Qwen/Qwen3-0.6B --max_length 1024 --learning_rate 1e-4 --bf16 --output_dir reward-qwen

A source is `name=path` or `name=hub-id[:data_dir]`, with the columns `prompt`, `chosen`, `rejected` (plain or
conversational), or with `chosen` and `rejected` alone as dialogues in the format of HH-RLHF.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

import hashlib
import json
import math
import random
import shlex
from collections import Counter
from dataclasses import dataclass, field

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import TrlParser

from trl_proxy.rewards import (
    CONFIG_NAME,
    ENCODER_PACKAGE,
    ROUTER_NAME,
    PreferenceReward,
    load_tokenizer,
    prompt_features,
    resolve_base,
    to_text,
)
from trl_proxy.runs import run_script

CUT_WORDS = 16  # the card shows how well the reward judges the first words of a response


@dataclass
class ScriptArguments:
    sources: list[str] = field(metadata={"help": "`name=file.jsonl` or `name=hub-id[:data_dir]`, one or two of them."})
    model_name_or_path: str = field(
        default=ENCODER_PACKAGE, metadata={"help": "Base of the reward; the default is the embedded encoder."}
    )
    max_length: int = field(default=96, metadata={"help": "Tokens of a (prompt, response) pair; the rest is cut off."})
    n_heldout: int = field(default=800, metadata={"help": "Held-out pairs per source, split by prompt."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split into training and held-out prompts."})
    train_on_heldout: bool = field(
        default=False,
        metadata={"help": "Train on the held-out pairs and evaluate on the others: a reward of pairs no other has."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, divided by its rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules to adapt; names are needed for some layers."},
    )
    lora_layers: list[int] | None = field(default=None, metadata={"help": "Layers to adapt; all by default."})
    cut_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of the pairs that are cut, both responses after the same random number of words: the "
            "reward then judges an unfinished response by what it says, not by its being short."
        },
    )
    router_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "`name=file.jsonl:kind` per source: more prompts, with `kind` and `split`, for the router."},
    )
    router_l2: float = field(default=3e-5, metadata={"help": "L2 penalty of the router."})
    data_description: str = field(default="", metadata={"help": "Names and licences of the data, for the card."})


@dataclass
class RewardTrainingArguments(TrainingArguments):
    output_dir: str = field(default="reward", metadata={"help": "Where adapter, router, config and card go."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Pairs per batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Responses per batch in the evaluation."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate; suits LoRA on a small encoder."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training pairs."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up, as a share of all steps when below 1."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    save_strategy: str = field(default="no", metadata={"help": "Checkpoints; the final adapter is always saved."})
    report_to: str = field(default="none", metadata={"help": "Trackers."})
    logging_steps: float = field(default=25, metadata={"help": "Steps between log lines."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads every column."})
    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": "Length-bucketed batches."})


# TRL's RewardTrainer cannot train this encoder on pairs: it joins prompt and response by a chat template, appends an
# EOS token (BERT tokenizers have neither) and drops `token_type_ids`, which tell prompt and response apart.
class PairTrainer(Trainer):
    """Bradley-Terry loss, -log sigmoid(s(x, chosen) - s(x, rejected)), for chosen rows followed by rejected ones."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: let Trainer scale accumulation

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = model(**inputs).logits.float().squeeze(1)
        chosen, rejected = scores.chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        return (loss, {"scores": scores}) if return_outputs else loss


def load_pairs(location: str) -> list[dict]:
    """Rows `{prompt, chosen, rejected}`, all strings, of a JSON(L) file or a hub dataset."""
    if Path(location).is_file():
        dataset = load_dataset("json", data_files=location, split="train")
    else:
        name, _, data_dir = location.partition(":")
        dataset = load_dataset(name, data_dir=data_dir or None, split="train")
    if missing := {"chosen", "rejected"} - set(dataset.column_names):
        raise ValueError(f"The source '{location}' has no column {sorted(missing)}; it has {dataset.column_names}.")
    if "prompt" in dataset.column_names:
        return [
            {"prompt": to_text(r["prompt"], "user")} | {k: to_text(r[k], "assistant") for k in ("chosen", "rejected")}
            for r in dataset
        ]
    rows = []
    for row in dataset:  # "\n\nHuman: ...\n\nAssistant: ...": the last answer is the response, the rest the prompt
        prompt, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
        rejected = row["rejected"].rpartition("\n\nAssistant:")[2]
        rows.append(
            {
                "prompt": prompt.removeprefix("\n\nHuman:").strip(),
                "chosen": chosen.strip(),
                "rejected": rejected.strip(),
            }
        )
    return rows


def heldout_prompts(rows: list[dict], n_heldout: int, seed: int) -> set[str]:
    """Prompts that cover about `n_heldout` rows, drawn by a hash so that other rows do not change the draw."""
    counts = Counter(row["prompt"] for row in rows)
    heldout, n_rows = set(), 0
    for prompt in sorted(counts, key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).hexdigest()):
        if n_rows >= n_heldout:
            break
        heldout.add(prompt)
        n_rows += counts[prompt]
    return heldout


def with_lengths(rows: list[dict], tokenizer, max_length: int) -> Dataset:
    """The pairs and `length`, the tokens of the longer response with its prompt."""
    lengths = []
    for key in ("chosen", "rejected"):
        texts = [(row["prompt"], row[key]) for row in rows]
        lengths.append([len(ids) for ids in tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]])
    return Dataset.from_list([row | {"length": max(pair)} for row, *pair in zip(rows, *lengths, strict=True)])


def first_words(text: str, n: int) -> str:
    """The first `n` words of a text; the text as it is where it has no more."""
    words = text.split()
    return text if len(words) <= n else " ".join(words[:n])


def cut(row: dict) -> dict:
    """The pair, both responses after the same number of words, drawn from 3 to the longer one's."""
    longest = max(len(row[key].split()) for key in ("chosen", "rejected"))
    n = random.randint(3, max(longest, 3))
    return row | {key: first_words(row[key], n) for key in ("chosen", "rejected")}


def load_router_prompts(entries: list[str], split: str) -> dict[str, list[str]]:
    """source -> prompts of one split of the files given as `name=file.jsonl:kind`."""
    prompts = {}
    for entry in entries:
        name, _, location = entry.partition("=")
        path, _, kind = location.rpartition(":")
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        prompts[name] = [row["prompt"] for row in rows if row["kind"] == kind and row["split"] == split]
    return prompts


def train_adapter(rows: list[dict], script_args: ScriptArguments, args: RewardTrainingArguments, folder: Path) -> None:
    """Trains one source's adapter and saves it in `folder`, in bfloat16: half the size at no measurable loss."""
    base = resolve_base(script_args.model_name_or_path)
    tokenizer = load_tokenizer(base)
    config = AutoConfig.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    if "attention_probs_dropout_prob" in config.to_dict():
        config.attention_probs_dropout_prob = 0.0  # drawing it takes long on a CPU
    # Eager attention: on short sequences its backward pass is faster on a CPU than that of sdpa
    attention = "eager" if args.use_cpu else None
    set_seed(args.seed)  # the output layer and the adapter are drawn here, before the Trainer seeds anything
    model = AutoModelForSequenceClassification.from_pretrained(
        base, config=config, dtype="float32", attn_implementation=attention
    )
    targets = script_args.lora_target_modules
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=script_args.lora_r,
        lora_alpha=script_args.lora_alpha,
        lora_dropout=script_args.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        layers_to_transform=script_args.lora_layers,
    )
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    def collate(examples):
        examples = [cut(row) if random.random() < script_args.cut_share else row for row in examples]
        texts = [(row["prompt"], row[key]) for key in ("chosen", "rejected") for row in examples]
        # Few different shapes: CPU kernels are compiled once per shape
        return tokenizer(
            texts,
            truncation=True,
            max_length=script_args.max_length,
            padding=True,
            pad_to_multiple_of=16,
            return_tensors="pt",
        )

    dataset = with_lengths(rows, tokenizer, script_args.max_length)
    trainer = PairTrainer(model=model, args=args, train_dataset=dataset, data_collator=collate)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # The base is stored by its public name: the folder it was loaded from means nothing elsewhere
    model.peft_config["default"].base_model_name_or_path = script_args.model_name_or_path
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's empty card; ours stands beside the adapters
    weights = folder / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in load_file(weights).items()}, weights)
    weights.chmod(0o644)  # safetensors writes for the owner alone, and a wheel keeps that


def train_router(sources: dict[str, list[str]], own: dict[str, list[str]], script_args: ScriptArguments, folder: str):
    """
    Logistic regression on the frozen encoder's features of the prompt: how likely it is of the first source.

    Args:
        sources (`dict`): source -> prompts of its training pairs.
        own (`dict`): source -> further prompts that belong to it, or empty; they make up a quarter of the loss.
    """
    base = resolve_base(script_args.model_name_or_path)
    encoder, tokenizer = AutoModel.from_pretrained(base, dtype="float32").eval(), load_tokenizer(base)
    first = next(iter(sources))
    features, labels, weights = [], [], []
    for share, group in ((0.75, sources), (0.25, own)) if own else ((1.0, sources),):
        for name, prompts in group.items():  # both sources weigh the same, whatever their sizes
            prompts = list(dict.fromkeys(prompts))
            features.append(prompt_features(encoder, tokenizer, prompts, script_args.max_length))
            labels += [name == first] * len(prompts)
            weights += [share / 2 / len(prompts)] * len(prompts)
    features, labels, weights = torch.cat(features), torch.tensor(labels), torch.tensor(weights)
    center = features.mean(0)
    weight, bias = torch.zeros_like(center, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = (features - center) @ weight + bias
        cross_entropy = torch.nn.functional.softplus(torch.where(labels, -logits, logits))
        loss = (weights * cross_entropy).sum() + script_args.router_l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    path = Path(folder) / ROUTER_NAME
    save_file({"weight": weight, "bias": bias - center @ weight}, path)
    path.chmod(0o644)


def accuracy(right: torch.Tensor) -> dict:
    """Share of right pairs (a tie is half right) with its 95 % Wilson interval; null where there is no pair."""
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
    # z-scored over the responses of the output's own source: there it was trained, there the router listens to it
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
    """README.md beside the adapter: data, command, accuracies with intervals next to the length baseline, limits."""

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
`trl_proxy.rewards.PreferenceReward.from_pretrained(folder, side="balanced")`.

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


def main(script_args: ScriptArguments, args: RewardTrainingArguments) -> None:
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
    path = Path(args.output_dir) / CONFIG_NAME
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")  # evaluation loads what users will load
    own = load_router_prompts(script_args.router_prompts, "test")
    metrics = evaluate(args.output_dir, config, train, heldout, own, args.per_device_eval_batch_size)
    path.write_text(json.dumps(config | {"metrics": metrics}, indent=2), encoding="utf-8")
    write_card(script_args, args, config, metrics, train)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, RewardTrainingArguments))
    run_script("train_reward", lambda: main(*parser.parse_args_and_config()))
