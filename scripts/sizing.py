"""What training a proxy takes, in memory and time, computed before anything is run; PPO with LoRA on the LM beside it.

    python scripts/sizing.py                                        # LMs of 1B, 7B and 70B: the table of the guide
    python scripts/sizing.py --config scripts/recipes/paper.yaml    # a recipe of scripts/train_proxy.py
    python scripts/sizing.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --load_in_4bit --max_completion_length 256

The flags are those of scripts/train_proxy.py as far as they matter here; of an LM its configuration alone is read.
Everything is counted for one device that holds the whole LM. Bytes and floating-point operations (FLOPs, a
multiplication and an addition being two) are compared in tests/scripts/test_sizing.py with what small LMs really need.
Times are the larger of operations over the device's throughput and bytes over its bandwidth, both times `efficiency`:
computed, measured on no GPU. What a GPU spends on starting kernels is not in them, and an LM of 1B is slowed by it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from trl import TrlParser

from eval.report import markdown_table
from trl_proxy import ProxyConfig
from trl_proxy.candidates import NUM_SCALARS
from trl_proxy.defaults import resolve_model
from trl_proxy.runs import run_script

GB = 1e9
# The architectures of Llama-3.2-1B, Mistral-7B-v0.3 and Llama-3.1-70B.
EXAMPLES = {
    "1B": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "7B": MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32768,
    ),
    "70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
# A weight in nf4 is half a byte, and every 64 share a scale in float32.
NF4_BYTES = 0.5 + 4 / 64
DECISION_BYTES = 3 * 8 + 4 * NUM_SCALARS + 2 * 1 + 4  # of rollout.Rollout, hidden states left out
CANDIDATE_BYTES = 8 + 4 + 1  # of candidates.Candidates


@dataclass
class SizingArguments:
    """The settings of a training that its size depends on, and the device."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "`embedded`, a folder or a hub id; by default examples of 1B, 7B and 70B."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "nf4, as --load_in_4bit of the training scripts."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of what is not in 4 bit; `auto` is bfloat16."})
    features: str = field(default="prefix", metadata={"help": "`prefix` or `candidate`."})
    feature_layers: list[int] = field(default_factory=lambda: [-1], metadata={"help": "Layers that the gate reads."})
    pooled_features: bool = field(default=False, metadata={"help": "The gate reads the mean of the states, too."})
    max_candidates: int = field(default=16, metadata={"help": "Most candidates offered at one position."})
    gate_hidden_sizes: list[int] = field(default_factory=lambda: [256], metadata={"help": "Hidden layers."})
    num_generations: int = field(default=4, metadata={"help": "Responses per prompt."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Responses in a minibatch."})
    steps_per_generation: int = field(default=4, metadata={"help": "Minibatches in a rollout."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs over a rollout."})
    replay_rollouts: int = field(default=1, metadata={"help": "Rollouts that an update of the gate learns from."})
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Responses that a gate decodes at once; all of a rollout's if not set."}
    )
    max_completion_length: int = field(default=128, metadata={"help": "Tokens of a response; all are as long."})
    prompt_tokens: int = field(default=256, metadata={"help": "Tokens of a prompt, the template included."})
    decisions_per_token: float = field(
        default=1.5, metadata={"help": "Decisions of the gate per token; the trainer logs it by this name."}
    )
    rejections_per_token: float = field(
        default=0.7, metadata={"help": "Rejected candidates per token; the trainer logs it as accepted_rank."}
    )
    reward_parameters: float = field(
        default=0.0, metadata={"help": "Parameters of a reward model on the same device, such as 6e8; in bfloat16."}
    )
    reward_shaping_tokens: int | None = field(
        default=None, metadata={"help": "A response is scored after every so many tokens."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA that PPO on the LM itself trains."})
    tflops: float = field(default=312.0, metadata={"help": "Throughput of the device in bfloat16, 1e12 FLOPs/s."})
    fp32_tflops: float = field(default=19.5, metadata={"help": "Of float32, in which the gate runs."})
    bandwidth: float = field(default=2.0, metadata={"help": "Of the device's memory, 1e12 bytes/s."})
    device_memory: float = field(default=80.0, metadata={"help": "Memory of the device in GB."})
    efficiency: float = field(default=0.5, metadata={"help": "Share of throughput and bandwidth that is reached."})

    def __post_init__(self):
        """Raises `ValueError` naming the argument, its value and what is allowed."""
        # Checks features, candidates and sizes.
        ProxyConfig(
            features=self.features,
            feature_layers=self.feature_layers,
            pooled_features=self.pooled_features,
            max_candidates=self.max_candidates,
            gate_hidden_sizes=self.gate_hidden_sizes,
        )
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ValueError(f"--dtype must be auto, bfloat16, float16 or float32, got {self.dtype}.")
        for name, value in vars(self).items():
            least = 0 if name in ("reward_parameters", "decisions_per_token", "rejections_per_token") else 1e-9
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value < least:
                raise ValueError(f"--{name} must be above 0, got {value}.")

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def responses(self) -> int:
        """Responses in a rollout."""
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return self.prompt_tokens + self.max_completion_length

    @property
    def scorings(self) -> int:
        """How often a response is scored."""
        return -(-self.max_completion_length // (self.reward_shaping_tokens or self.max_completion_length))


@dataclass(frozen=True)
class Shape:
    """What size depends on in an LM, counted on the model built without weights."""

    parameters: int
    linear: int  # weights of linear layers, the head left out: every token passes them, and 4 bit replaces them
    head: int  # weights that make logits of a hidden state
    lora_per_rank: int  # inputs and outputs of those layers
    hidden_size: int
    embedding_size: int
    intermediate_size: int
    vocab_size: int
    num_layers: int
    attention_size: int  # of the queries of a layer
    kv_size: int  # of the keys, and of the values, of a layer

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        """Counts a causal LM with this configuration."""
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        head, text = lm.get_output_embeddings(), config.get_text_config()
        layers = [m.weight.shape for m in lm.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        linear = sum(n_out * n_in for n_out, n_in in layers)
        return cls(
            parameters=sum(p.numel() for p in lm.parameters()),
            linear=linear,
            head=head.weight.numel(),
            lora_per_rank=sum(n_out + n_in for n_out, n_in in layers),
            hidden_size=text.hidden_size,
            embedding_size=lm.get_input_embeddings().embedding_dim,
            intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocab_size=text.vocab_size,
            num_layers=text.num_hidden_layers,
            attention_size=heads * head_dim,
            kv_size=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        )


# Memory, in bytes


def lm_bytes(shape: Shape, args: SizingArguments) -> float:
    """The frozen weights."""
    quantized = shape.linear if args.load_in_4bit else 0
    return quantized * NF4_BYTES + (shape.parameters - quantized) * args.dtype_bytes


def cache_bytes(shape: Shape, args: SizingArguments, rows: int, slots: int) -> int:
    """Keys and values of so many rows of so many slots."""
    return 2 * shape.num_layers * shape.kv_size * args.dtype_bytes * rows * slots


def gate_slots(args: SizingArguments) -> int:
    """Slots of a row's cache when the last token of a response is decided (`caches.growing_cache`, `RowCache`)."""
    if args.features == "candidate":
        return args.length + args.max_candidates - 1
    slots = args.prompt_tokens + max(32, args.prompt_tokens // 8)
    while slots < args.length - 1:  # the last token is never fed
        slots += 1
        slots += max(32, slots // 8)
    return slots


def state_size(shape: Shape, args: SizingArguments) -> int:
    """Of the hidden states that a decision reads."""
    return shape.hidden_size * len(args.feature_layers) * (2 if args.pooled_features else 1)


def feature_size(shape: Shape, args: SizingArguments) -> int:
    """Inputs of the gate, and of the critic."""
    extra = shape.embedding_size + NUM_SCALARS if args.features == "prefix" else 0
    return state_size(shape, args) + extra


def proxy_parameters(shape: Shape, args: SizingArguments) -> int:
    """Of gate and critic."""
    sizes = [feature_size(shape, args), *args.gate_hidden_sizes, 1]
    return 2 * sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(sizes))


def rollout_bytes(shape: Shape, args: SizingArguments, rows: int) -> float:
    """The record of so many responses, `rollout.Rollout`: hidden states of every token (prefix features) or of every
    decision (candidate features), and what was decided; padding to the row with most decisions is not counted."""
    decisions = rows * args.max_completion_length * args.decisions_per_token
    states = rows * args.max_completion_length if args.features == "prefix" else decisions
    return states * state_size(shape, args) * args.dtype_bytes + decisions * DECISION_BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for. `peak` is the most that is held at once, which is less than the sum of all."""

    lm: float
    cache: float
    rollout: float
    trained: float  # weights, gradients and Adam's two moments
    peak: float


def gate_memory(shape: Shape, args: SizingArguments) -> Memory:
    """Of training a gate. The LM runs in the rollout alone."""
    rows = min(args.rollout_batch_size or args.responses, args.responses)
    lm = lm_bytes(shape, args) + 2 * args.reward_parameters
    trained = 16 * proxy_parameters(shape, args)
    one, cache = rollout_bytes(shape, args, args.responses), cache_bytes(shape, args, rows, gate_slots(args))
    # The last rollout is held while the next one is made; with replay the last ones, and the minibatches made of them.
    held = one if args.replay_rollouts == 1 else 2 * args.replay_rollouts * one
    chunk = rollout_bytes(shape, args, rows) + rows * args.max_completion_length * args.max_candidates * (
        2 * CANDIDATE_BYTES + 4 * NUM_SCALARS
    )
    prefill = prefill_bytes(shape, args, rows / args.num_generations)
    features = 4 * args.responses * args.max_completion_length * args.decisions_per_token * feature_size(shape, args)
    phases = [
        held + one + chunk + max(cache, prefill),  # hidden states step by step, and stacked
        one + 4 * features,  # standardising the first rollout: four copies, float32
        held + 5 * features * args.replay_rollouts / args.steps_per_generation,  # what backward needs
    ]
    return Memory(lm, cache, held, trained, lm + trained + max(phases))


def prefill_bytes(shape: Shape, args: SizingArguments, rows: float) -> float:
    """The widest moment of a layer while so many prompts are read."""
    return rows * args.prompt_tokens * (4 * shape.intermediate_size + 5 * shape.hidden_size) * args.dtype_bytes


def lora_parameters(shape: Shape, args: SizingArguments) -> int:
    """LoRA on every linear layer but the head, as scripts/train_baseline.py does by default."""
    return args.lora_r * shape.lora_per_rank


def ppo_memory(shape: Shape, args: SizingArguments) -> Memory:
    """Of PPO with LoRA on the LM itself (`PPOTrainer`), with gradient checkpointing, its default."""
    lm = lm_bytes(shape, args) + 2 * args.reward_parameters
    # TRL keeps the adapter of a quantized LM in bfloat16, of others it is float32.
    trained = (8 if args.load_in_4bit else 16) * lora_parameters(shape, args)
    cache = cache_bytes(shape, args, args.responses, args.length - 1)
    read = cache * args.prompt_tokens / args.length + prefill_bytes(shape, args, args.responses)
    tokens = args.per_device_train_batch_size * args.length
    checkpoints = (shape.num_layers + 2) * tokens * shape.hidden_size * args.dtype_bytes
    # One layer at a time with all that backward needs, in float32 as the adapters are; or a tile of logits (TRL's
    # sizes), its gradient beside it.
    layer = 4 * tokens * (6 * shape.intermediate_size + 9 * shape.hidden_size)
    tile = 2 * 4 * min(tokens, 4096) * min(shape.vocab_size, 32768)
    return Memory(lm, cache, 0.0, trained, lm + trained + max(cache, read, checkpoints + max(layer, tile)))


# Floating-point operations per episode


def lm_flops(shape: Shape, tokens: float, logits: float, pairs: float, adapter: int = 0) -> float:
    """A forward of the LM: tokens through all layers, positions through the head, and pairs of a query and a key."""
    attention = 4 * shape.attention_size * shape.num_layers * pairs
    return 2 * (shape.linear + adapter) * tokens + 2 * shape.head * logits + attention


@dataclass(frozen=True)
class Flops:
    """FLOPs per episode."""

    prefill: float
    decode: float
    update: float  # all that comes after the rollout but the reward
    reward: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode + self.update + self.reward


def decode_pairs(args: SizingArguments) -> float:
    """Queries and keys of a response that is written token by token, the last prompt token read with it."""
    prompt, new = args.prompt_tokens, args.max_completion_length
    return new * prompt + new * (new - 1) / 2


def forwards_per_token(args: SizingArguments) -> float:
    """Of the LM, while a gate decides."""
    return 1.0 + (args.rejections_per_token if args.features == "candidate" else 0.0)


def reward_flops(args: SizingArguments) -> float:
    return 2 * args.reward_parameters * args.length * args.scorings


def gate_flops(shape: Shape, args: SizingArguments) -> Flops:
    """Of training a gate: a prompt is read once for all of its responses, and the update runs the MLPs alone."""
    read, new = args.prompt_tokens - 1, args.max_completion_length
    fed = new * forwards_per_token(args)
    sizes = [feature_size(shape, args), *args.gate_hidden_sizes, 1]
    first, network = sizes[0] * sizes[1], sum(n_in * n_out for n_in, n_out in itertools.pairwise(sizes))
    decisions = new * args.decisions_per_token
    # With prefix features all candidates of a position are judged at once.
    judged = new * args.max_candidates if args.features == "prefix" else decisions
    # Forward, then the gradients of weights and of inputs, but of the features none.
    epoch = 2 * (6 * network - 2 * first) * args.replay_rollouts
    return Flops(
        prefill=lm_flops(shape, read, 0, read * read) / args.num_generations,
        decode=lm_flops(shape, fed, new, decode_pairs(args) * forwards_per_token(args)) + 2 * network * judged,
        update=decisions * (2 * 2 * network + args.num_iterations * epoch),
        reward=reward_flops(args),
    )


def ppo_flops(shape: Shape, args: SizingArguments, scored: int | None = None) -> Flops:
    """Of PPO with LoRA on the LM itself: a response each reads its prompt; the log-probabilities of the policy and of
    the reference; in every epoch forward, recomputation and backward. `scored`: positions through the head, by default
    those of the response, as TRL does on a GPU."""
    adapter, length, scored = lora_parameters(shape, args), args.length, scored or args.max_completion_length
    one_pass = lm_flops(shape, length, scored, length**2, adapter)
    again = lm_flops(shape, length, 0, length**2, adapter)
    # No gradients of the frozen weights, of the adapters' both; logits are recomputed in tiles.
    backward = lm_flops(shape, length, 2 * scored, 2 * length**2, 2 * adapter)
    return Flops(
        prefill=lm_flops(shape, args.prompt_tokens - 1, 0, args.prompt_tokens**2, adapter),
        decode=lm_flops(shape, args.max_completion_length, args.max_completion_length, decode_pairs(args), adapter),
        update=one_pass
        + lm_flops(shape, length, scored, length**2)
        + args.num_iterations * (one_pass + again + backward),
        reward=reward_flops(args),
    )


# Time


def read_bytes(shape: Shape, args: SizingArguments, rows: float) -> float:
    """Weights that a forward of so many rows moves. For more than one row bitsandbytes writes 4-bit weights out in
    16 bits and reads them again."""
    quantized = shape.linear if args.load_in_4bit else 0
    per_weight = NF4_BYTES + (2 * args.dtype_bytes if rows > 1 else 0)
    return quantized * per_weight + (shape.linear + shape.head - quantized) * args.dtype_bytes


def rollout_seconds(shape: Shape, args: SizingArguments, flops: Flops, rows: int, prompts: float, steps: float):
    """Of one response: prompts are read at once, tokens one after the other."""
    throughput, bandwidth = args.tflops * 1e12 * args.efficiency, args.bandwidth * 1e12 * args.efficiency
    weights = read_bytes(shape, args, rows)
    keys = cache_bytes(shape, args, 1, 1) * (args.prompt_tokens + args.max_completion_length / 2)
    prefill = max(flops.prefill / throughput, read_bytes(shape, args, prompts) / rows / bandwidth)
    return prefill + max(flops.decode / throughput, steps * (weights / rows + keys) / bandwidth)


def gate_seconds(shape: Shape, args: SizingArguments) -> float:
    """Per episode of training a gate."""
    flops = gate_flops(shape, args)
    rows = min(args.rollout_batch_size or args.responses, args.responses)
    steps = args.max_completion_length * forwards_per_token(args)
    rollout = rollout_seconds(shape, args, flops, rows, rows / args.num_generations, steps)
    # The update reads and writes the features about 25 times in an epoch, in float32.
    decisions = args.max_completion_length * args.decisions_per_token
    moved = 25 * 4 * decisions * feature_size(shape, args) * args.num_iterations * args.replay_rollouts
    update = max(flops.update / (args.fp32_tflops * 1e12), moved / (args.bandwidth * 1e12)) / args.efficiency
    return rollout + update + flops.reward / (args.tflops * 1e12 * args.efficiency)


def ppo_seconds(shape: Shape, args: SizingArguments) -> float:
    """Per episode of PPO with LoRA on the LM itself."""
    flops = ppo_flops(shape, args)
    rollout = rollout_seconds(shape, args, flops, args.responses, args.responses, args.max_completion_length)
    return rollout + (flops.update + flops.reward) / (args.tflops * 1e12 * args.efficiency)


# The table


def rows_of(name: str, shape: Shape, args: SizingArguments) -> list[dict[str, str]]:
    """A row for the gate as it is set, and one for PPO with LoRA."""
    precision = "4 bit" if args.load_in_4bit else f"{8 * args.dtype_bytes} bit"
    gate = f"gate, {args.features}{', pooled' if args.pooled_features else ''}"
    rows = []
    for method, parameters, memory, flops, seconds in (
        (gate, proxy_parameters(shape, args), gate_memory, gate_flops, gate_seconds),
        (f"LM, LoRA r={args.lora_r}", lora_parameters(shape, args), ppo_memory, ppo_flops, ppo_seconds),
    ):
        need = memory(shape, args)
        rows.append(
            {
                "LM": f"{name}, {precision}",
                "trained": method,
                "parameters": f"{parameters / 1e6:.1f} M",
                "LM, GB": f"{need.lm / GB:.1f}",
                "KV cache, GB": f"{need.cache / GB:.1f}",
                "rollouts, GB": f"{need.rollout / GB:.2f}" if need.rollout else "",
                "trained, GB": f"{need.trained / GB:.2f}",
                "peak, GB": f"{need.peak / GB:.0f}" + (" (too much)" if need.peak > args.device_memory * GB else ""),
                "TFLOPs per episode": f"{flops(shape, args).total / 1e12:.1f}",
                "seconds per 1,000 episodes": f"{1000 * seconds(shape, args):.0f}",
            }
        )
    return rows


def table(args: SizingArguments) -> list[dict[str, str]]:
    """The examples with both kinds of features, in 16 and in 4 bit; or the one LM that is named, as it is set."""
    if args.model_name_or_path:
        config = AutoConfig.from_pretrained(resolve_model(args.model_name_or_path))
        return rows_of(args.model_name_or_path, Shape.of(config), args)
    rows = []
    for name, config in EXAMPLES.items():
        shape = Shape.of(config)
        for load_in_4bit in (False, True):
            here = replace(args, load_in_4bit=load_in_4bit)
            prefix = replace(here, features="prefix", pooled_features=True)
            candidate = replace(here, features="candidate", pooled_features=False)
            rows += [rows_of(name, shape, candidate)[0], *rows_of(name, shape, prefix)]
    return rows


def make_parser() -> TrlParser:
    return TrlParser((SizingArguments,), description=__doc__.partition("\n")[0])


def main(args: SizingArguments) -> None:
    """Prints the table, and what it was computed for."""
    rows = table(args)
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    print(
        f"\n{args.responses} responses in a rollout, {args.per_device_train_batch_size} in a minibatch, "
        f"{args.num_iterations} epochs; prompts of {args.prompt_tokens} tokens, responses of "
        f"{args.max_completion_length}; {args.decisions_per_token:g} decisions and {args.rejections_per_token:g} "
        f"rejections per token. One device of {args.device_memory:g} GB, {args.tflops:g} TFLOPs/s in 16 bits, "
        f"{args.fp32_tflops:g} in float32, {args.bandwidth:g} TB/s, of which {args.efficiency:.0%} are reached. "
        f"Computed, not measured. 1,000 episodes are {1000 * args.max_completion_length / args.responses:,.0f} steps "
        "in which a rollout grows by a token: where your `generate` takes longer for one, that is what counts."
    )


if __name__ == "__main__":
    # A recipe has more settings than matter here.
    run_script("sizing", lambda: main(*make_parser().parse_args_and_config(fail_with_unknown_args=False)))
