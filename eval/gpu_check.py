"""What a GPU is needed to know: whether gated decoding is exact there, its speed, its waits, the cost of training.

Nothing is downloaded: the LMs have random weights and the shapes of a model of 1B and of 7B. Random weights offer the
most candidates at every position, so gated speeds are the lowest that these shapes can have.
"""

import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from eval.records import git_commit, package_versions
from eval.report.tables import print_table
from eval.sizing import EXAMPLES
from trl_proxy import PPOConfig, PPOTrainer, ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.devices import best_device, half_dtype, peak_memory_mb
from trl_proxy.files import write_text

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"
PAD, EOS = 0, 2
SMALL = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    initializer_range=0.25,  # so that an untrained LM's outputs vary
    tie_word_embeddings=True,
)
# A decision or a candidate this near to the other side may differ by rounding.
MARGIN = 1e-4


class Measured(NamedTuple):
    """A figure of gated decoding or training, next to what it is compared with."""

    what: str
    unit: str
    gated: float | None
    reference: float | None = None

    def as_dict(self) -> dict:
        ratio = self.gated / self.reference if self.gated is not None and self.reference else None
        return {**self._asdict(), "ratio": ratio}


class Sizes(NamedTuple):
    """How much is measured."""

    lms: dict[str, tuple[PretrainedConfig, bool]]  # name -> configuration, whether it is in 4 bit
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    trained: PretrainedConfig
    responses: int  # of a rollout
    response_tokens: int


FULL = Sizes(
    {"1B": (EXAMPLES["1B"], False), "7B": (EXAMPLES["7B"], False), "7B in 4 bit": (EXAMPLES["7B"], True)},
    batches=(1, 32, 128),
    prompt_tokens=64,
    new_tokens=48,
    rounds=2,
    trained=EXAMPLES["1B"],
    responses=64,
    response_tokens=128,
)
TINY = Sizes(
    {"tiny": (SMALL, False), "tiny in 4 bit": (SMALL, True)},
    batches=(1, 4),
    prompt_tokens=4,
    new_tokens=4,
    rounds=1,
    trained=SMALL,
    responses=8,
    response_tokens=4,
)


@dataclass
class GpuCheckArguments:
    """How long the check may take, and where its figures go."""

    output: str = field(default="outputs/gpu_check.json", metadata={"help": "The file for all figures."})
    seconds: float = field(default=480.0, metadata={"help": "A part that does not fit into this time is left out."})
    tiny: bool = field(default=False, metadata={"help": "Tiny LMs on any device: shows that the check itself works."})
    part: str | None = field(default=None, metadata={"help": "Only this part, its figures as JSON lines."})

    def __post_init__(self):
        if not self.seconds > 0:
            raise ValueError(f"--seconds must be above 0, got {self.seconds}.")
        if self.part not in (None, *PARTS):
            raise ValueError(f"--part must be one of {', '.join(PARTS)}, got {self.part}.")


# What all parts need


def build_lm(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, four_bit: bool = False):
    """A random LM of this architecture, made on the device."""
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    lm.generation_config.eos_token_id, lm.generation_config.pad_token_id = EOS, PAD
    if four_bit:
        to_4_bit(lm, dtype)
    return lm


def lm_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or what the device computes in instead."""
    return getattr(torch, half_dtype(device))


def to_4_bit(lm: nn.Module, dtype: torch.dtype) -> None:
    """Quantizes every linear layer but the head to nf4, as loading in 4 bit does."""
    import bitsandbytes as bnb

    head = lm.get_output_embeddings()
    for parent in list(lm.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or layer is head:
                continue
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4", device="meta"
            )
            weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
            )
            new.weight, new.bias = weight.to(layer.weight.device), layer.bias
            setattr(parent, name, new)


def with_gate(lm, reject_rate: float = 0.3, seed: int | None = None, **config) -> ProxyModelForCausalLM:
    """A gate over the LM. It rejects at this rate; with a seed its decisions depend on what it reads."""
    model = ProxyModelForCausalLM(lm, ProxyConfig(**config))
    last = model.gate.mlp[-1]
    with torch.no_grad():
        last.bias.fill_(math.log((1 - reject_rate) / reject_rate))
        if seed is not None:
            weight = torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(seed))
            last.weight.copy_(8 * weight / last.weight.shape[1] ** 0.5)
            last.bias.zero_()
    return model


def ragged_batch(vocab_size: int, lengths: list[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left."""
    ids, mask = (
        torch.full((len(lengths), max(lengths)), PAD),
        torch.zeros(len(lengths), max(lengths), dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = torch.randint(4, vocab_size, (length,)), 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, until the device is done."""
    _wait_for(device)
    started = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# The parts


def exactness(sizes: Sizes, device: torch.device) -> Iterator[Measured]:
    """Rows of tiny batches that come out as they must: accepting everything is the LM itself, and the fast paths give
    the tokens of a loop that runs the whole text for every proposal."""
    new_tokens = 8 if sizes is TINY else 24
    for dtype, features in (
        (torch.float32, "prefix"),
        (torch.float32, "candidate"),
        (torch.bfloat16, "prefix"),
    ):
        lm = build_lm(SMALL, device, dtype)
        batch = ragged_batch(SMALL.vocab_size, [3, 7, 1, 5, 4, 6, 2, 7], device)
        width, name = batch["input_ids"].shape[1], f"{features}, {str(dtype).removeprefix('torch.')}"
        accepting = ProxyModelForCausalLM(lm, ProxyConfig(features=features))
        plain = lm.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
        gated = accepting.generate(**batch, max_new_tokens=new_tokens)
        equal = (pad_to(plain, width + new_tokens) == pad_to(gated, width + new_tokens)).all(-1)
        yield Measured(f"accepts all = generate, {name}", "rows", int(equal.sum()), len(equal))
        if dtype != torch.float32:  # two exact ways differ by rounding
            continue
        model = with_gate(lm, seed=1, features=features, p_t=0.1)
        fast = pad_to(model.generate(**batch, max_new_tokens=new_tokens), width + new_tokens)[:, width:].tolist()
        clear = same = 0
        for row, mask in enumerate(batch["attention_mask"]):
            tokens, margin = decode_by_hand(model, batch["input_ids"][row][mask.bool()].tolist(), new_tokens)
            clear += margin > MARGIN
            same += margin > MARGIN and tokens + [PAD] * (new_tokens - len(tokens)) == fast[row]
        yield Measured(f"fast = brute force, {name}", "rows", same, clear)


def pad_to(ids: torch.Tensor, width: int) -> torch.Tensor:
    """Token ids, padded on the right."""
    return nn.functional.pad(ids, (0, width - ids.shape[1]), value=PAD)


@torch.no_grad()
def decode_by_hand(model: ProxyModelForCausalLM, ids: list[int], new_tokens: int) -> tuple[list[int], float]:
    """Greedy decisions on one prompt, without a cache, a batch or the closed form.

    Returns:
        the response, and how near its closest call was.
    """
    config, device, response, margin = model.proxy_config, model.lm.device, [], math.inf

    def state_after(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        output = model.lm(torch.tensor([tokens], device=device), output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[-1][0]
        return torch.cat([hidden[-1], hidden.mean(0)]), output.logits[0, -1].float()

    while len(response) < new_tokens and EOS not in response:
        before = ids + response
        state, logits = state_after(before)
        values, order = logits.log_softmax(-1).sort(descending=True, stable=True)
        log_probs, floor = values.tolist(), math.log(config.p_t) + float(values[0])
        count = max(sum(x >= floor for x in log_probs[: config.max_candidates]), 1)
        margin = min([margin, *(a - b for a, b in itertools.pairwise(log_probs[: count + 1]))])
        margin = min([margin, *(abs(x - floor) for x in log_probs[1 : count + 1])])
        for rank, token in enumerate(order[:count].tolist()):
            if rank == count - 1:
                break
            if config.features == "candidate":
                features = state_after([*before, token])[0]
            else:
                gap = log_probs[0] - log_probs[rank]
                scalars = [
                    max(log_probs[rank], -20.0) / 4,
                    gap / 4,
                    rank / 16,
                    count / 16,
                    min(len(before), 1024) / 128,
                ]
                embedding = model.lm.get_input_embeddings().weight[token]
                features = torch.cat([state, embedding, torch.tensor(scalars, device=device)])
            logit = float(model.gate(features[None])) - config.threshold
            margin = min(margin, abs(logit))
            if logit >= 0:
                break
        response.append(token)
    return response, margin


def speed(sizes: Sizes, device: torch.device) -> Iterator[Measured]:
    """Tokens per second of the gate's sampled decisions against the LM's own sampling, in turns."""
    for name, (config, four_bit) in sizes.lms.items():
        lm = build_lm(config, device, lm_dtype(device), four_bit)
        model = with_gate(lm)
        for batch_size in sizes.batches:
            batch = ragged_batch(config.vocab_size, [sizes.prompt_tokens] * batch_size, device)
            runs = ways_to_generate(model, batch, sizes.new_tokens)
            spent: dict[str, list[float]] = {way: [] for way in runs}
            for turn in range(sizes.rounds + 1):
                for way, run in runs.items():
                    seconds = seconds_of(run, device)
                    if turn:  # the first one warms up
                        spent[way].append(seconds)
            tokens = batch_size * sizes.new_tokens
            gated, plain = (tokens / statistics.median(spent[way]) for way in ("gated", "plain"))
            yield Measured(f"{name}, batch {batch_size}", "tokens/s", gated, plain)
        del lm, model, runs
        _forget(device)


def ways_to_generate(model: ProxyModelForCausalLM, batch: dict, new_tokens: int) -> dict[str, Callable[[], Any]]:
    """Sampling without and with the gate; no response ends early."""
    options = {**batch, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": PAD}
    return {
        "plain": lambda: model.lm.generate(**options, do_sample=True, top_k=0),
        "gated": lambda: model.generate(**options, gate_sample=True),
    }


def _forget(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def waits(sizes: Sizes, device: torch.device) -> Iterator[Measured]:
    """How often a token makes the host wait for the device, by torch's own warnings; null where torch has none."""
    lm = build_lm(SMALL, device, torch.float32)
    batch = ragged_batch(SMALL.vocab_size, [4] * 4, device)
    for features in ("prefix", "candidate"):
        model = with_gate(lm, features=features, p_t=0.01)
        few, many = (ways_to_generate(model, batch, new_tokens) for new_tokens in (8, 24))
        found: dict[str, float | None] = dict.fromkeys(few)
        for way in few if device.type == "cuda" else ():
            few[way]()
            found[way] = (count_waits(many[way]) - count_waits(few[way])) / 16
        yield Measured(f"{features} features", "waits/token", found["gated"], found["plain"])


def count_waits(run: Callable[[], Any]) -> int:
    """How often a call makes the host wait for a CUDA device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)


class StepTimes(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self, device: torch.device):
        self.device, self.ends = device, []

    def on_step_end(self, args, state, control, **kwargs):
        _wait_for(self.device)
        self.ends.append(time.perf_counter())


def train(sizes: Sizes, device: torch.device, way: str) -> dict[str, float]:
    """Trains two rollouts of four steps; seconds of a rollout and of a step of the second one, and the peak memory."""
    _forget(device)
    lm, minibatch = build_lm(sizes.trained, device, lm_dtype(device)), sizes.responses // 4
    words = {f"w{i}": i for i in range(sizes.trained.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))  # nosec B106
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=f"w{PAD}", eos_token=f"w{EOS}", padding_side="left"
    )
    prompts = [" ".join(f"w{4 + (i * 7 + k) % 90}" for k in range(sizes.prompt_tokens)) for i in range(minibatch * 2)]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": minibatch,
            "steps_per_generation": 4,
            "num_iterations": 1,
            "max_completion_length": sizes.response_tokens,
            "max_steps": 8,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "use_cpu": device.type == "cpu",
        }
        times = StepTimes(device)
        shared = {
            "reward_funcs": lambda prompts, completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
            "train_dataset": Dataset.from_dict({"prompt": prompts}),
            "processing_class": tokenizer,
            "callbacks": [times],
        }
        if way == "proxy":
            trainer = ProxyPPOTrainer(with_gate(lm), args=ProxyPPOConfig(**settings), **shared)
        else:
            lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = PPOTrainer(lm, args=PPOConfig(**settings), peft_config=lora, **shared)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    step = statistics.median(b - a for a, b in itertools.pairwise(times.ends[4:]))
    return {
        "s/rollout": max(times.ends[4] - times.ends[3] - step, 0.0),
        "s/step": step,
        "MiB at most": peak_memory_mb(device),
    }


def training(sizes: Sizes, device: torch.device) -> Iterator[Measured]:
    """A training of the gate next to PPO with LoRA on the LM itself, by the same trainer's own settings."""
    proxy, ppo = (train(sizes, device, way) for way in ("proxy", "ppo"))
    for unit, value in proxy.items():
        yield Measured(f"training, {sizes.responses} x {sizes.response_tokens}", unit, value, ppo[unit])


def vllm(sizes: Sizes, device: torch.device) -> Iterator[Measured]:
    """Tokens per second of vLLM's plain sampling with the first LM's shape; null where it is not installed."""
    name, (config, _) = next(iter(sizes.lms.items()))
    batch_size, found = sizes.batches[-1], None
    if find_spec("vllm") is not None and device.type == "cuda":
        from vllm import LLM, SamplingParams

        with tempfile.TemporaryDirectory() as folder:
            config.architectures = ["LlamaForCausalLM"]
            config.save_pretrained(folder)
            engine = LLM(folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024)
        prompts = [
            {"prompt_token_ids": ids}
            for ids in torch.randint(4, config.vocab_size, (batch_size, sizes.prompt_tokens)).tolist()
        ]
        sampling = SamplingParams(max_tokens=sizes.new_tokens, ignore_eos=True, detokenize=False)
        engine.generate(prompts, sampling)
        seconds = seconds_of(lambda: engine.generate(prompts, sampling), device)
        found = batch_size * sizes.new_tokens / seconds
    yield Measured(f"vLLM without a gate, {name}, batch {batch_size}", "tokens/s", None, found)


class Part(NamedTuple):
    """A part of the check, and the seconds that it may take."""

    rows: Callable[[Sizes, torch.device], Iterator[Measured]]
    seconds: float


# Together 480 seconds; the first ones are the most important.
PARTS = {
    "exactness": Part(exactness, 45.0),
    "waits": Part(waits, 30.0),
    "training": Part(training, 120.0),
    "speed": Part(speed, 200.0),
    "vllm": Part(vllm, 85.0),
}


# The check


def run_here(part: str, tiny: bool) -> Iterator[dict]:
    """The rows of a part, measured in this process."""
    set_seed(0)
    device = best_device()
    for row in PARTS[part].rows(TINY if tiny else FULL, device):
        yield row.as_dict()


def run_apart(command: list[str], seconds: float) -> tuple[list[dict], str]:
    """The rows that a command prints as JSON lines within its time, and what became of it. Afterwards it is killed;
    its rows are kept."""
    try:
        ended = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
        status, output = "done", ended.stdout
        if ended.returncode:
            reason = ended.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            status = f"failed: {reason[0][-300:]}"
    except subprocess.TimeoutExpired as error:
        status, output = f"stopped after its {seconds:.0f} s", error.stdout or b""
    lines = output.decode(errors="replace").splitlines()
    rows = [json.loads(line) for line in lines if line.startswith('{"what": ') and line.endswith("}")]
    return rows, status


def measure(args: GpuCheckArguments) -> dict[str, dict]:
    """All parts, each as `{"status", "seconds", "rows"}`. A part gets its time, and less at the end of all time."""
    results, started = {}, time.monotonic()
    for name, part in PARTS.items():
        began = time.monotonic()
        left = args.seconds - (began - started)
        if left < min(part.seconds, args.seconds) / 2:
            rows, status = [], f"skipped: {max(left, 0):.0f} s are left, it needs {part.seconds:.0f} s"
        elif args.tiny:  # no part of it takes long
            rows, status = list(run_here(name, tiny=True)), "done"
        else:
            rows, status = run_apart([sys.executable, str(SCRIPT), "--part", name], min(part.seconds, left))
        results[name] = {"status": status, "seconds": time.monotonic() - began, "rows": rows}
        print(f"{name}: {status} ({results[name]['seconds']:.0f} s)", flush=True)
    return results


def describe_gpu(device: torch.device) -> str:
    """The device by its name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def print_check(results: dict[str, dict]) -> None:
    """One table of all figures."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    rows = [
        [row["what"], row["unit"], *(number(row[key]) for key in ("gated", "reference", "ratio"))]
        for part in results.values()
        for row in part["rows"]
    ]
    print_table(["", "unit", "gated", "reference", "ratio"], rows, left=2)


def gpu_check(args: GpuCheckArguments) -> dict:
    """Runs all parts, writes `args.output` and prints the table.

    Raises:
        ValueError: there is no CUDA device, and `--tiny` was not asked for; gated decoding was not exact; or a part
            failed.
    """
    if args.part is not None:
        for row in run_here(args.part, args.tiny):
            print(json.dumps(row), flush=True)
        return {}
    device = best_device()
    if device.type != "cuda" and not args.tiny:
        raise ValueError("This machine has no CUDA device: --tiny runs the check with tiny LMs on any device.")
    check = {
        "device": describe_gpu(device),
        "command": " ".join(sys.argv),
        "arguments": asdict(args),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    check["parts"] = measure(args)
    write_text(args.output, json.dumps(check, indent=1, allow_nan=False))
    print_check(check["parts"])
    rows = check["parts"]["exactness"]["rows"]
    if wrong := [row["what"] for row in rows if not row["gated"] == row["reference"] > 0]:
        raise ValueError(f"Gated decoding is not exact on {check['device']}: {'; '.join(wrong)}.")
    if failed := [f"{name} {part['status']}" for name, part in check["parts"].items() if "failed" in part["status"]]:
        raise ValueError(f"The check is not complete: {'; '.join(failed)}.")
    return check


def make_parser() -> HfArgumentParser:
    return HfArgumentParser(GpuCheckArguments, description=__doc__.partition("\n")[0])
