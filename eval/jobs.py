"""What a comparison evaluates, on which prompts, and which of it has a record already."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from trl import ModelConfig

from baselines.training import BASELINES, method_of
from eval.records import Run, prompts_sha256, read_record
from eval.trained import TrainedRun, at_thresholds
from trl_proxy.loading import EMBEDDED, load_prompts
from trl_proxy.reading import UnknownSplit
from trl_proxy.runs.arguments import DecodingArguments, parse_dicts
from trl_proxy.runs.process import find_file
from trl_proxy.runs.resume import changed_keys

METHODS = ("sft", "proxy", "best_of_n")


@dataclass
class CompareArguments(DecodingArguments):
    """What is compared, on what, and where the records go. By default an LM is decoded as it was in training."""

    proxies: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of trained proxies. `folder:seed` gives the training seed if run.json does not."},
    )
    baselines: list[str] = field(
        default_factory=list, metadata={"help": "Folders of scripts/train_baseline.py, of any method and seed."}
    )
    recipes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "`proxy=recipe.yaml`, `ppo=recipe.yaml`, ...: trained first if needed, one run per seed under the "
            "output folder."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds of the recipes."})
    train_settings: dict | str | None = field(
        default=None,
        metadata={"help": "Field -> value, for all trainings, over their recipes; JSON on the command line."},
    )
    launch: str = field(
        default="accelerate launch", metadata={"help": "How to run a training script: a command line."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "Of sft, proxy, best_of_n. sft is always evaluated: the others are measured against it."},
    )
    thresholds: list[float] = field(
        default_factory=list,
        metadata={"help": "Every proxy is evaluated at these too: above its own it rejects more, without training."},
    )
    best_of: list[int] = field(
        default_factory=lambda: [2, 4, 8], metadata={"help": "The n of best-of-n, all from the same samples."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of best-of-n's samples."})
    top_p: float = field(default=1.0, metadata={"help": "Of best-of-n's samples: the LM's whole distribution."})
    dataset_name: str = field(
        default=EMBEDDED,
        metadata={
            "help": "`embedded`, a file (.json, .jsonl, .csv, .parquet, also .gz), a folder of such files, or a "
            "dataset of the hub."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, if it has some."})
    split: str = field(default="test", metadata={"help": "Its split, or a part of one: `train[90%%:]`."})
    num_prompts: int | None = field(
        default=None, metadata={"help": "Size of a fixed random choice of prompts; all of them by default."}
    )
    reward_model_name_or_path: str = field(
        default=EMBEDDED,
        metadata={"help": "`embedded`, `embedded:<side>`, the dotted path of a reward function, or a model id."},
    )
    gold_reward_model_name_or_path: str = field(
        default=f"{EMBEDDED}:gold", metadata={"help": "A reward that no method was trained on; `none` for none."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest response."})
    batch_size: int = field(default=32, metadata={"help": "Prompts per batch, the same for every method."})
    seed: int = field(default=0, metadata={"help": "Of best-of-n's samples. A proxy's seed is its training's."})
    output_dir: str = field(default="outputs/compare", metadata={"help": "Where records, plots and report go."})
    use_cpu: bool = field(default=False, metadata={"help": "Evaluate on the CPU, whatever else this machine has."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the LM's own code of the hub."})
    overwrite: bool = field(default=False, metadata={"help": "Evaluate again what has a record already."})

    def __post_init__(self):
        """Raises `ValueError` naming the argument, its value and what is allowed."""
        super().__post_init__()
        parse_dicts(self, "train_settings")
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ValueError(f"--methods knows {', '.join(METHODS)}, not {', '.join(unknown)}.")
        for recipe in self.recipes:
            method, _, path = recipe.partition("=")
            if method_of(method) not in ("proxy", *BASELINES) or not Path(find_file(path)).is_file():
                raise ValueError(
                    f"--recipes must be <method>=<file>, with a method of proxy, {', '.join(BASELINES)} and a file "
                    f"that exists, got {recipe!r}."
                )
        from_recipe = any(recipe.startswith("proxy=") for recipe in self.recipes)
        if "proxy" in self.methods and not (self.proxies or from_recipe):
            raise ValueError(
                "--proxies names no folder of a trained proxy: give one, or leave proxy out of --methods."
            )
        if "best_of_n" in self.methods and (not self.best_of or min(self.best_of) < 1):
            raise ValueError(f"--best_of must name numbers of at least 1, got {self.best_of}.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"--temperature must be above 0 and --top_p in (0, 1], got {self.temperature} and {self.top_p}."
            )
        for name in ("max_new_tokens", "batch_size", "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")


def decode_as_trained(args: CompareArguments, trained: list[TrainedRun]) -> None:
    """Sets the decoding arguments that were not given to those of the trainings.

    Raises:
        ValueError: if the trainings differ in one of them.
    """
    for name in ("generation_kwargs", "chat_template_kwargs", "system_prompt"):
        values = [one.decoding.get(name) or None for one in trained]
        if getattr(args, name) is None and values:
            if differing := [one for one, value in zip(trained, values, strict=True) if value != values[0]]:
                raise ValueError(
                    f"{trained[0].folder} was trained with {name}={values[0]}, {differing[0].folder} with "
                    f"{differing[0].decoding.get(name)}: say which counts by --{name}."
                )
            setattr(args, name, values[0])


def select_prompts(args: CompareArguments) -> Dataset:
    """The prompts of the comparison, the same ones for every seed."""
    try:
        prompts = load_prompts(args.dataset_name, args.split, config=args.dataset_config)
    except UnknownSplit as error:
        raise ValueError(f"--split {args.split}: {error}") from None
    if args.num_prompts is None:
        return prompts
    if args.num_prompts > len(prompts):
        raise ValueError(
            f"--num_prompts is {args.num_prompts}, {args.dataset_name} ({args.split}) has {len(prompts)}."
        )
    return prompts.shuffle(seed=0).select(range(args.num_prompts))


def evaluation_jobs(
    args: CompareArguments, model_args: ModelConfig, trained: list[TrainedRun], prompts: Dataset
) -> list[tuple[Run, TrainedRun | int | None]]:
    """Every evaluation with its input: a trained run, the n of best-of-n, or None.

    Raises:
        ValueError: if two of them would write the same record.
    """
    gold = args.gold_reward_model_name_or_path
    dataset = "/".join(filter(None, (args.dataset_name, args.dataset_config, args.split)))
    common = {
        "model": model_args.model_name_or_path or EMBEDDED,
        "reward_model": args.reward_model_name_or_path,
        "gold_reward_model": None if gold == "none" else gold,
        "dataset": f"{dataset}@sha256:{prompts_sha256(prompts['prompt'][:])[:16]}",
        "max_new_tokens": args.max_new_tokens,
    }
    settings = {
        "batch_size": args.batch_size,
        "dtype": model_args.dtype,
        "model_revision": model_args.model_revision,
        "load_in_4bit": model_args.load_in_4bit,
        "load_in_8bit": model_args.load_in_8bit,
    }
    for name in ("generation_kwargs", "chat_template_kwargs"):
        if value := getattr(args, name):
            settings[name] = value
    jobs = [(Run(method="sft", seed=args.seed, settings=settings, **common), None)]
    for one in itertools.chain.from_iterable((t, *at_thresholds(t, args.thresholds)) for t in trained):
        run = Run(
            method=one.method,
            variant=one.variant,
            seed=one.seed,
            settings={**settings, **one.settings},
            adapter_bytes=one.adapter_bytes,
            episodes=one.episodes,
            train_seconds=one.train_seconds,
            train_peak_memory_mb=one.train_peak_memory_mb,
            **common,
        )
        jobs.append((run, one))
    if "best_of_n" in args.methods:
        for n in sorted(set(args.best_of)):
            sampling = {**settings, "temperature": args.temperature, "top_p": args.top_p}
            run = Run(
                method="best_of_n",
                variant=f"n={n}",
                seed=args.seed,
                settings=sampling,
                **common,
            )
            jobs.append((run, n))
    paths = [run.path(args.output_dir) for run, _ in jobs]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f"Two runs would write {twice} because they share variant and seed: give their seeds as folder:seed, or "
            "compare them under different --output_dir."
        )
    return jobs


def existing_record(run: Run, output_dir: str) -> dict | None:
    """The record of this evaluation; None if there is none.

    Raises:
        ValueError: if there is one with other settings, or a damaged one.
    """
    path = run.path(output_dir)
    if not path.is_file():
        return None
    record = read_record(path)
    keys = ("model", "reward_model", "gold_reward_model", "dataset", "max_new_tokens")
    before = {**{key: record.get(key) for key in keys}, **record.get("settings", {})}
    now = {**{key: getattr(run, key) for key in keys}, **run.settings}
    if changed := changed_keys(before, now):
        raise ValueError(
            f"{path} was written with other settings (different: {', '.join(changed)}): choose another --output_dir, "
            "or evaluate again with --overwrite."
        )
    return record
