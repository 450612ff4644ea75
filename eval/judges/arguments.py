"""The flags of scripts/judge.py."""

from dataclasses import dataclass, field

from trl_proxy.core.values import is_json_object
from trl_proxy.runs.arguments import parse_dicts

RECORDED = {  # judge -> keys of a record: its scores and its name
    "reward": ("rewards", "reward_model"),
    "gold": ("gold_rewards", "gold_reward_model"),
}
JUDGES = (*RECORDED, "transformers", "openai", "readers")


@dataclass
class JudgeArguments:
    """Who judges, what, and at which price."""

    judges: list[str] = field(
        default_factory=lambda: ["reward"],
        metadata={
            "help": "Of reward and gold (scores of the records), transformers (the causal LM of "
            "--model_name_or_path), openai (an endpoint) and readers (people, who get a page or a CSV file)."
        },
    )
    output_dir: str = field(default="outputs/compare", metadata={"help": "Of scripts/compare.py, with its records."})
    judge_prompt_file: str | None = field(
        default=None,
        metadata={"help": "A text with $prompt, $response_a, $response_b; by default eval/judges/judge_prompt.txt."},
    )
    batch_size: int = field(default=8, metadata={"help": "transformers: questions per forward."})
    use_cpu: bool = field(default=False, metadata={"help": "transformers: on the CPU, whatever this machine has."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "transformers: run the LM's own code of the hub."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "transformers: arguments of the judge's chat template, as JSON."}
    )
    judge_model: str | None = field(default=None, metadata={"help": "openai: the model's name at the endpoint."})
    judge_base_url: str | None = field(
        default=None, metadata={"help": "openai: the endpoint; OPENAI_BASE_URL or OpenAI itself by default."}
    )
    judge_request: str = field(
        default='{"temperature": 0, "max_tokens": 8}',
        metadata={"help": "openai: further fields of every request, as JSON."},
    )
    ask_again: int = field(
        default=2, metadata={"help": "openai: times that a question is asked again if its reply is not A, B or tie."}
    )
    concurrency: int = field(default=8, metadata={"help": "openai: requests at the same time."})
    requests_per_minute: float | None = field(default=None, metadata={"help": "openai: most requests per minute."})
    timeout: float = field(default=60.0, metadata={"help": "openai: seconds that a request may take."})
    retries: int = field(
        default=5, metadata={"help": "openai: of a request that timed out or was refused with 429 or 5xx."}
    )
    price_prompt: float | None = field(default=None, metadata={"help": "openai: of a million prompt tokens."})
    price_completion: float | None = field(default=None, metadata={"help": "openai: of a million reply tokens."})
    replies: str | None = field(
        default=None, metadata={"help": "openai: file of the replies; judgements/replies.sqlite by default."}
    )
    readers: int = field(
        default=2, metadata={"help": "readers: how many read each pair; the second has sides swapped."}
    )
    reader_pairs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "readers: methods or records to read against each other, such as proxy:best_of_n; by default "
            "every record against sft."
        },
    )
    sitting_pairs: int = field(default=130, metadata={"help": "readers: most pairs of one sitting."})
    reader_seed: int = field(default=0, metadata={"help": "readers: of sides, order and ids."})
    verdicts: list[str] = field(
        default_factory=list,
        metadata={"help": "readers: files or folders that came back; by default <output_dir>/readers/verdicts."},
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Judge again what is judged already; an endpoint's replies stay. Export pairs again."},
    )

    def __post_init__(self):
        """Raises `ValueError` naming the argument, its value and what is allowed."""
        parse_dicts(self, "chat_template_kwargs")
        if not self.judges or not set(self.judges) <= set(JUDGES):
            raise ValueError(f"--judges must be of {', '.join(JUDGES)}, got {self.judges}.")
        if "openai" in self.judges and not self.judge_model:
            raise ValueError("--judge_model is not set: name the endpoint's model that judges.")
        at_least = {"batch_size": 1, "concurrency": 1, "readers": 1, "sitting_pairs": 1, "ask_again": 0, "retries": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("requests_per_minute", "timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be above 0, got {value}.")
        if (self.price_prompt is None) != (self.price_completion is None):
            raise ValueError("--price_prompt and --price_completion must be set together, or neither.")
        if not is_json_object(self.judge_request):
            raise ValueError(f"--judge_request must be a JSON object, got {self.judge_request!r}.")
