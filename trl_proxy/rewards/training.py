"""Training of the preference reward: its data, its adapters and its router."""

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..prompts import check_dataset, to_text
from ..reading import check_pairs, read_dataset, with_prompts
from .preference import ENCODER_PACKAGE, ROUTER_NAME, load_tokenizer, prompt_features, resolve_base

CUT_WORDS = 16  # the card shows how well the reward judges the first words of a response


@dataclass
class ScriptArguments:
    """The preference pairs, and what is trained on them."""

    sources: list[str] = field(
        metadata={"help": "`name=file`, `name=folder` or `name=hub-id[:data_dir]`, one or two of them."}
    )
    model_name_or_path: str = field(
        default=ENCODER_PACKAGE, metadata={"help": "Base of the reward; the default is the embedded encoder."}
    )
    max_length: int = field(default=96, metadata={"help": "Tokens of a (prompt, response) pair; the rest is cut off."})
    n_heldout: int = field(default=800, metadata={"help": "Held-out pairs per source, split by prompt."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split into training and held-out prompts."})
    train_on_heldout: bool = field(
        default=False,
        metadata={"help": "Train on the held-out pairs and evaluate on the others, for an independent reward."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, divided by its rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules to adapt; `lora_layers` needs their names."},
    )
    lora_layers: list[int] | None = field(default=None, metadata={"help": "Layers to adapt; all by default."})
    cut_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of the pairs whose responses are both cut after the same random number of words. The "
            "reward then judges an unfinished response by its content, not by its length."
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
    """transformers' training arguments with defaults for an encoder."""

    output_dir: str = field(default="reward", metadata={"help": "Folder for adapter, router, config and card."})
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


# TRL's RewardTrainer cannot train this encoder on pairs. It uses a chat template and an EOS token, and BERT tokenizers
# have neither. It also drops `token_type_ids`, which tell prompt and response apart.
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
    """Rows `{prompt, chosen, rejected}`, all strings, of a dataset as for [`~trl_proxy.reading.read_dataset`], or of
    `hub-id:data_dir`. A dialogue without a prompt of its own becomes `...\n\nAssistant: ...\n\nHuman: ...`."""
    name, _, data_dir = (location, "", "") if Path(location).exists() else location.partition(":")
    dataset = read_dataset(name, data_dir=data_dir or None)
    explicit = "prompt" in dataset.column_names
    dataset = with_prompts(dataset, location)
    if explicit:
        check_dataset(dataset, location)
    return [
        {"prompt": to_text(pair["prompt"], "user") if explicit else _dialogue_text(pair["prompt"])}
        | {key: to_text(pair[key], "assistant") for key in ("chosen", "rejected")}
        for pair in check_pairs(dataset, location)
    ]


def _dialogue_text(messages: list[dict]) -> str:
    """A conversation in the format of HH-RLHF, without the first `Human:`."""
    names = {"user": "Human", "assistant": "Assistant"}
    turns = [f"\n\n{names.get(m['role'], m['role'])}: {to_text([m], m['role'])}" for m in messages]
    return "".join(turns).removeprefix("\n\nHuman: ")


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
    """The pairs, and as `length` the tokens of the prompt with the longer response."""
    lengths = []
    for key in ("chosen", "rejected"):
        texts = [(row["prompt"], row[key]) for row in rows]
        lengths.append([len(ids) for ids in tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]])
    return Dataset.from_list([row | {"length": max(pair)} for row, *pair in zip(rows, *lengths, strict=True)])


def first_words(text: str, n: int) -> str:
    """The first `n` words of a text, or the unchanged text if it has no more."""
    words = text.split()
    return text if len(words) <= n else " ".join(words[:n])


def cut(row: dict) -> dict:
    """Cuts both responses of a pair after the same random number of words, from 3 to the longer one's length."""
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
        config.attention_probs_dropout_prob = 0.0  # dropout is slow on a CPU
    # Eager attention: on short sequences its backward pass is faster on a CPU than that of sdpa
    attention = "eager" if args.use_cpu else None
    set_seed(args.seed)  # the new weights are drawn here, before the Trainer sets its seed
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

    # The base is stored by its public name: its folder means nothing on other machines
    model.peft_config["default"].base_model_name_or_path = script_args.model_name_or_path
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's empty card; ours is for all adapters
    weights = folder / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in load_file(weights).items()}, weights)
    weights.chmod(0o644)  # only the owner can read safetensors' files, and a wheel keeps the mode


def train_router(sources: dict[str, list[str]], own: dict[str, list[str]], script_args: ScriptArguments, folder: str):
    """
    Logistic regression on the frozen encoder's features of a prompt, for the probability of the first source.

    Args:
        sources (`dict`): source -> prompts of its training pairs.
        own (`dict`): source -> further prompts that belong to it, or empty; they make up a quarter of the loss.
    """
    base = resolve_base(script_args.model_name_or_path)
    encoder, tokenizer = AutoModel.from_pretrained(base, dtype="float32").eval(), load_tokenizer(base)
    first = next(iter(sources))
    features, labels, weights = [], [], []
    for share, group in ((0.75, sources), (0.25, own)) if own else ((1.0, sources),):
        for name, prompts in group.items():  # both sources have the same weight, whatever their sizes
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
