"""Speed of gated decoding against the LM's own `generate`, measured in turns over the cells of a grid."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from tqdm import tqdm
from transformers import DynamicCache

from baselines.policy import LAST_POSITION
from trl_proxy import ProxyConfig, ProxyModelForCausalLM
from trl_proxy.core.gate import decide
from trl_proxy.decoding.hidden_states import HiddenStateHook
from trl_proxy.loading import EMBEDDED, load_prompts

PLAIN = "generate, sampled"
MEMORY = ("generate", "prefix", "candidate", "train")
PROXIES = {
    "prefix": ProxyConfig(pooled_features=False),
    "prefix, as in training": ProxyConfig(),
    "candidate": ProxyConfig(features="candidate", pooled_features=False),
}


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
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"--{name} must be numbers of at least 1, got {getattr(self, name)}.")
        if not self.reject_rates or not all(0.0 <= rate < 1.0 for rate in self.reject_rates):
            raise ValueError(f"--reject_rates must lie in [0, 1), got {self.reject_rates}.")
        if self.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {self.rounds}.")
        if self.memory not in (None, *MEMORY):
            raise ValueError(f"--memory must be one of {', '.join(MEMORY)}, got {self.memory!r}.")


@dataclass(frozen=True)
class BenchmarkCell:
    """One point of the grid."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    reject_rate: float


def grid(args: BenchmarkArguments) -> list[BenchmarkCell]:
    """The base cell, and every cell that differs from it in one thing."""
    if args.quick:
        base = BenchmarkCell(
            max(args.batch_sizes), min(args.prompt_tokens), min(args.new_tokens), args.reject_rates[0]
        )
        return [base, BenchmarkCell(**{**asdict(base), "batch_size": min(args.batch_sizes)})]
    base = BenchmarkCell(args.batch_sizes[-1], args.prompt_tokens[0], args.new_tokens[0], args.reject_rates[0])
    axes = {
        "batch_size": args.batch_sizes,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "reject_rate": args.reject_rates,
    }
    cells = [BenchmarkCell(**{**asdict(base), name: value}) for name, values in axes.items() for value in values]
    return list(dict.fromkeys([base, *cells]))


def prompts_of_length(tokenizer, batch_size: int, length: int) -> torch.Tensor:
    """Token ids `(batch, length)` of running text: the test prompts one after another."""
    text = " ".join(prompt[-1]["content"] for prompt in load_prompts(EMBEDDED, "test")["prompt"])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids.repeat(math.ceil(batch_size * length / len(ids)))[: batch_size * length].view(batch_size, length)


@torch.no_grad()
def serial_decode(model: ProxyModelForCausalLM, input_ids: torch.Tensor, new_tokens: int) -> tuple[int, int]:
    """The per-candidate loop at batch 1 that MARA describes (arXiv 2505.19743): top-k 40 and top-p 0.95 proposals in
    descending probability, one forward of the LM for each, the cache cut back after a rejection.

    Returns:
        tokens written and forwards of the LM.
    """
    lm, cache, forwards = model.lm, DynamicCache(config=model.lm.config), 1
    logits = lm(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
    with HiddenStateHook(lm) as tap:
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


def methods_of(
    cell: BenchmarkCell, models: dict[str, ProxyModelForCausalLM], ids: torch.Tensor
) -> dict[str, Callable]:
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


def measure(cell: BenchmarkCell, models: dict, tokenizer, rounds: int, progress: tqdm) -> dict:
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
