"""Memory that a training takes, counted before it is run."""

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from eval.report.tables import markdown_table
from trl_proxy import ProxyConfig
from trl_proxy.core.features import NUM_SCALARS, part_sizes, state_size
from trl_proxy.decoding.hidden_states import embedding_size_of
from trl_proxy.loading import resolve_model
from trl_proxy.runs.parsing import RecipeParser

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
PROXY_FIELDS = ("features", "feature_layers", "pooled_features", "max_candidates", "gate_hidden_sizes")
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
    pooled_features: bool = field(default=True, metadata={"help": "The gate reads the mean of the states, too."})
    max_candidates: int = field(default=16, metadata={"help": "Most candidates offered at one position."})
    gate_hidden_sizes: list[int] = field(default_factory=lambda: [256], metadata={"help": "Hidden layers."})
    num_generations: int = field(default=4, metadata={"help": "Responses per prompt."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Responses in a minibatch."})
    steps_per_generation: int = field(default=4, metadata={"help": "Minibatches in a rollout."})
    replay_rollouts: int = field(default=4, metadata={"help": "Rollouts that an update of the gate learns from."})
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Responses that a gate decodes at once; all of a rollout's if not set."}
    )
    max_completion_length: int = field(default=128, metadata={"help": "Tokens of every response."})
    prompt_tokens: int = field(default=256, metadata={"help": "Tokens of a prompt, the template included."})
    decisions_per_token: float = field(
        default=1.5, metadata={"help": "Decisions of the gate per token; the trainer logs it by this name."}
    )
    reward_parameters: float = field(
        default=0.0, metadata={"help": "Parameters of a reward model on the same device, such as 6e8; in bfloat16."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA that PPO on the LM itself trains."})
    device_memory: float = field(default=80.0, metadata={"help": "Memory of the device in GB."})

    def __post_init__(self):
        """Raises `ValueError` naming the argument, its value and what is allowed."""
        # Checks features, candidates and sizes.
        ProxyConfig(**{name: getattr(self, name) for name in PROXY_FIELDS})
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ValueError(f"--dtype must be auto, bfloat16, float16 or float32, got {self.dtype}.")
        for name, value in vars(self).items():
            least = 0 if name in ("reward_parameters", "decisions_per_token") else 1e-9
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


@dataclass(frozen=True)
class Shape:
    """The sizes of an LM that memory depends on, counted on the model built without weights."""

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
            embedding_size=embedding_size_of(lm),
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
    """Keys and values of `rows` rows of `slots` slots."""
    return 2 * shape.num_layers * shape.kv_size * args.dtype_bytes * rows * slots


def gate_slots(args: SizingArguments) -> int:
    """Slots of a row's cache when the last token of a response is decided (`growing_cache`, `RowCache`)."""
    if args.features == "candidate":
        return args.length + args.max_candidates - 1
    slots = args.prompt_tokens + max(32, args.prompt_tokens // 8)
    while slots < args.length - 1:  # the last token is never fed
        slots += 1
        slots += max(32, slots // 8)
    return slots


def proxy_config(shape: Shape, args: SizingArguments) -> ProxyConfig:
    """Configuration of the proxy to be trained."""
    sizes = {"hidden_size": shape.hidden_size, "embedding_size": shape.embedding_size}
    return ProxyConfig(**{name: getattr(args, name) for name in PROXY_FIELDS}, **sizes)


def feature_size(shape: Shape, args: SizingArguments) -> int:
    """Inputs of the gate, and of the critic."""
    parts, scalars = part_sizes(proxy_config(shape, args))
    return sum(parts) + scalars


def proxy_parameters(shape: Shape, args: SizingArguments) -> int:
    """Parameters of gate and critic."""
    sizes = [feature_size(shape, args), *args.gate_hidden_sizes, 1]
    return 2 * sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(sizes))


def rollout_bytes(shape: Shape, args: SizingArguments, rows: int) -> float:
    """The record of `rows` responses, `rollout.Rollout`: hidden states of every token (prefix features) or of every
    decision (candidate features), and the decisions. Padding to the row with most decisions is not counted."""
    decisions = rows * args.max_completion_length * args.decisions_per_token
    states = rows * args.max_completion_length if args.features == "prefix" else decisions
    return states * state_size(proxy_config(shape, args)) * args.dtype_bytes + decisions * DECISION_BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose. `peak` is the most that is held at once, which is less than the sum of all."""

    lm: float
    cache: float
    rollout: float
    trained: float  # weights, gradients and Adam's two moments
    peak: float


def gate_memory(shape: Shape, args: SizingArguments) -> Memory:
    """Memory of training a gate. The LM runs only in the rollout."""
    rows = min(args.rollout_batch_size or args.responses, args.responses)
    lm = lm_bytes(shape, args) + 2 * args.reward_parameters
    trained = 16 * proxy_parameters(shape, args)
    one, cache = rollout_bytes(shape, args, args.responses), cache_bytes(shape, args, rows, gate_slots(args))
    # The last rollout is held while the next one is made; with replay the last ones and their minibatches.
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
    """The largest activations of a layer while `rows` prompts are read."""
    return rows * args.prompt_tokens * (4 * shape.intermediate_size + 5 * shape.hidden_size) * args.dtype_bytes


def lora_parameters(shape: Shape, args: SizingArguments) -> int:
    """LoRA on every linear layer but the head, as scripts/train_baseline.py does by default."""
    return args.lora_r * shape.lora_per_rank


def ppo_memory(shape: Shape, args: SizingArguments) -> Memory:
    """Memory of PPO with LoRA on the LM itself (`PPOTrainer`), with gradient checkpointing, its default."""
    lm = lm_bytes(shape, args) + 2 * args.reward_parameters
    # TRL keeps the adapter of a quantized LM in bfloat16, other adapters in float32.
    trained = (8 if args.load_in_4bit else 16) * lora_parameters(shape, args)
    cache = cache_bytes(shape, args, args.responses, args.length - 1)
    read = cache * args.prompt_tokens / args.length + prefill_bytes(shape, args, args.responses)
    tokens = args.per_device_train_batch_size * args.length
    checkpoints = (shape.num_layers + 2) * tokens * shape.hidden_size * args.dtype_bytes
    # One layer at a time with all that backward needs, in float32 as the adapters are; or a tile of logits (TRL's
    # sizes) and its gradient.
    layer = 4 * tokens * (6 * shape.intermediate_size + 9 * shape.hidden_size)
    tile = 2 * 4 * min(tokens, 4096) * min(shape.vocab_size, 32768)
    return Memory(lm, cache, 0.0, trained, lm + trained + max(cache, read, checkpoints + max(layer, tile)))


# The table


def rows_of(name: str, shape: Shape, args: SizingArguments) -> list[dict[str, str]]:
    """A row for the gate as it is set, and one for PPO with LoRA."""
    precision = "4 bit" if args.load_in_4bit else f"{8 * args.dtype_bytes} bit"
    gate = f"gate, {args.features}{', pooled' if args.pooled_features else ''}"
    rows = []
    for method, parameters, need in (
        (gate, proxy_parameters(shape, args), gate_memory(shape, args)),
        (f"LM, LoRA r={args.lora_r}", lora_parameters(shape, args), ppo_memory(shape, args)),
    ):
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
            }
        )
    return rows


def table(args: SizingArguments) -> list[dict[str, str]]:
    """Rows of the named LM, or of the examples, the largest in 4 bit."""
    if args.model_name_or_path:
        config = AutoConfig.from_pretrained(resolve_model(args.model_name_or_path))
        return rows_of(args.model_name_or_path, Shape.of(config), args)
    rows = []
    for name, config in EXAMPLES.items():
        rows += rows_of(name, Shape.of(config), replace(args, load_in_4bit=name == "70B"))
    return rows


def make_parser() -> RecipeParser:
    return RecipeParser((SizingArguments,), description=__doc__.partition("\n")[0])


def print_sizing(args: SizingArguments) -> None:
    """Prints the table, and what it was computed for."""
    rows = table(args)
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    print(
        f"\n{args.responses} responses in a rollout, {args.per_device_train_batch_size} in a minibatch; prompts of "
        f"{args.prompt_tokens} tokens, responses of {args.max_completion_length}; "
        f"{args.decisions_per_token:g} decisions per token. One device of {args.device_memory:g} GB. Computed, not "
        "measured."
    )
