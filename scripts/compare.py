"""Compares trained proxies and baselines with the LM itself and best-of-n on the same prompts, batches and rewards.

The embedded LM, reward and prompts, on two CPU cores:

    python scripts/compare.py --config scripts/recipes/compare_smollm2_cpu.yaml \\
        --proxies outputs/proxy-seed0 outputs/proxy-seed1 --output_dir outputs/compare

Any causal LM, reward model and dataset of the hub, on a GPU:

    python scripts/compare.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --load_in_4bit --proxies outputs/qwen-proxy \\
        --dataset_name trl-lib/ultrafeedback-prompt --split test \\
        --reward_model_name_or_path Skywork/Skywork-Reward-V2-Qwen3-0.6B --gold_reward_model_name_or_path none \\
        --best_of 2 4 8 16 32 --batch_size 64 --max_new_tokens 256 --output_dir outputs/compare-qwen

Everything from its recipe, trained where it is not yet, three seeds each:

    python scripts/compare.py --config scripts/recipes/compare_all_smollm2_cpu.yaml

Writes one record per method and seed under `<output_dir>/records`, and draws from all the records that are there the
tables, `plots/`, `samples.md` and `report.md`. The same command again goes on where an interrupted run stopped:
records that exist with the same settings are kept, so repeating a finished command only draws again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
import trl_proxy  # noqa: F401 - before TRL: it silences bitsandbytes

# isort: split

import dataclasses
import itertools
import os
from dataclasses import dataclass, field

import yaml
from datasets import Dataset
from trl import ModelConfig, TrlParser

from baselines import best_of_n, sft
from baselines.policy import ProxyPolicy
from baselines.reward_model import load_callable_reward
from baselines.training import BASELINES, load_trained
from eval.harness import Run, evaluate_completions, evaluate_policy, prompts_sha256, read_record, read_records
from eval.plots import draw_all
from eval.plots_training import TrainingLog, plot_training_curve
from eval.report import print_summary, report_markdown, samples_markdown
from eval.trained import Trained, at_thresholds, read_baseline, read_proxy
from trl_proxy import ProxyModelForCausalLM
from trl_proxy.card import add_results
from trl_proxy.defaults import EMBEDDED, load_prompts
from trl_proxy.devices import inference_device
from trl_proxy.files import write_text
from trl_proxy.runs import (
    find_file,
    flags,
    hold,
    is_finished,
    launcher,
    load_policy,
    parse_dicts,
    run_command,
    run_script,
    to_device,
    wait_until_free,
)

METHODS = ("sft", "proxy", "best_of_n")


@dataclass
class CompareArguments:
    """What is compared, on what, and where the records go."""

    proxies: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of trained proxies. `folder:seed` says the training seed where run.json does not."},
    )
    baselines: list[str] = field(
        default_factory=list, metadata={"help": "Folders of scripts/train_baseline.py, of any method and seed."}
    )
    recipes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "`proxy=recipe.yaml`, `rlhf=recipe.yaml`, ...: trained first, where that is not done, one run per "
            "seed under the output folder."
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
    dataset_name: str = field(default=EMBEDDED, metadata={"help": "`embedded`, a JSON file or a hub dataset."})
    split: str = field(default="test", metadata={"help": "Its split."})
    num_prompts: int | None = field(
        default=None, metadata={"help": "A fixed random choice of so many prompts; all of them by default."}
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
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the LM's own code of the hub."})
    overwrite: bool = field(default=False, metadata={"help": "Evaluate again what has a record already."})

    def __post_init__(self):
        """Raises `ValueError` naming the argument, its value and what is allowed."""
        parse_dicts(self, "train_settings")
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ValueError(f"--methods knows {', '.join(METHODS)}, not {', '.join(unknown)}.")
        for recipe in self.recipes:
            method, _, path = recipe.partition("=")
            if method not in ("proxy", *BASELINES) or not Path(find_file(path)).is_file():
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
            value = self.__dict__[name]
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")


def make_parser() -> TrlParser:
    return TrlParser((CompareArguments, ModelConfig), description=__doc__.partition("\n")[0])


# What is to be trained


def train_missing(args: CompareArguments) -> list[Trained]:
    """Runs the training scripts for the recipes; what is finished already is left alone, what was interrupted goes on.

    Returns:
        everything that the recipes train.

    Raises:
        ValueError: if a training script fails.
    """
    trained = []
    for recipe in args.recipes:
        method, _, path = recipe.partition("=")
        path = find_file(path)
        recipe_settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        for seed in args.seeds:
            folder = os.path.join(args.output_dir, f"{method}-seed{seed}")
            settings = args.train_settings | {"seed": seed}
            wait_until_free(folder)
            if not is_finished(folder, recipe_settings | settings):
                print(f"Training {folder} by {path}.")
                script = ["train_proxy.py"] if method == "proxy" else ["train_baseline.py", "--method", method]
                script[0] = str(Path(__file__).with_name(script[0]))
                command = [*launcher(args.launch), *script, "--config", path]
                if run_command([*command, *flags(settings), "--output_dir", folder]):
                    raise ValueError(f"training {folder} failed, see above; the same command goes on from there.")
            trained.append(read_proxy(folder) if method == "proxy" else read_baseline(folder))
    return trained


# What is to be evaluated


def select_prompts(args: CompareArguments) -> Dataset:
    """The prompts of the comparison, the same ones for every seed."""
    prompts = load_prompts(args.dataset_name, args.split)
    if args.num_prompts is None:
        return prompts
    if args.num_prompts > len(prompts):
        raise ValueError(
            f"--num_prompts is {args.num_prompts}, {args.dataset_name} ({args.split}) has {len(prompts)}."
        )
    return prompts.shuffle(seed=0).select(range(args.num_prompts))


def plan(
    args: CompareArguments, model_args: ModelConfig, trained: list[Trained], prompts: Dataset
) -> list[tuple[Run, Trained | int | None]]:
    """Every evaluation with what it needs: something trained, the n of best-of-n, or nothing.

    Raises:
        ValueError: if two of them would write the same record.
    """
    gold = args.gold_reward_model_name_or_path
    common = {
        "model": model_args.model_name_or_path or EMBEDDED,
        "reward_model": args.reward_model_name_or_path,
        "gold_reward_model": None if gold == "none" else gold,
        "dataset": f"{args.dataset_name}/{args.split}@sha256:{prompts_sha256(prompts['prompt'][:])[:16]}",
        "max_new_tokens": args.max_new_tokens,
    }
    settings = {
        "batch_size": args.batch_size,
        "dtype": model_args.dtype,
        "model_revision": model_args.model_revision,
        "load_in_4bit": model_args.load_in_4bit,
        "load_in_8bit": model_args.load_in_8bit,
    }
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
            f"Two runs would write {twice}, being of one variant and seed: give their seeds as folder:seed, or "
            "compare them under different --output_dir."
        )
    return jobs


def existing_record(run: Run, output_dir: str) -> dict | None:
    """The record of this very evaluation, None where there is none.

    Raises:
        ValueError: if there is one with other settings, or a damaged one.
    """
    path = run.path(output_dir)
    if not path.is_file():
        return None
    record = read_record(path)
    keys = ("model", "reward_model", "gold_reward_model", "dataset", "max_new_tokens")
    before = {**{key: record.get(key) for key in keys}, **record.get("settings", {})}
    now = {**{key: run.__dict__[key] for key in keys}, **run.settings}
    if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        raise ValueError(
            f"{path} was written with other settings (different: {', '.join(changed)}): choose another --output_dir, "
            "or evaluate again with --overwrite."
        )
    return record


# Evaluation


def start(run: Run, **facts) -> Run:
    """The run as it begins: with what only the loaded model tells, and the time."""
    return dataclasses.replace(run, started_at="", **facts)


def evaluate(
    args: CompareArguments,
    model_args: ModelConfig,
    prompts: Dataset,
    jobs: list[tuple[Run, Trained | int | None]],
) -> None:
    """Evaluates the jobs that have no record yet."""
    records = [None if args.overwrite else existing_record(run, args.output_dir) for run, _ in jobs]
    pending = [job for job, record in zip(jobs, records, strict=True) if record is None]
    print(f"{len(jobs) - len(pending)} of {len(jobs)} records are there already, {len(pending)} to go.")
    if not pending:
        return
    first, device = jobs[0][0], inference_device()
    reward, gold_reward = (  # before the LM: they are small, and a wrong name should be known soon
        load_callable_reward(name, batch_size=args.batch_size, device=device)
        for name in (first.reward_model, first.gold_reward_model)
    )
    lm, tokenizer = load_policy(model_args, args, device)
    lm = to_device(lm, device)
    shared = (prompts, reward, gold_reward, lm, tokenizer)
    decoding = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    conversations = prompts["prompt"][:]
    columns = {name: prompts[name][:] for name in prompts.column_names if name != "prompt"}

    sft_policy = sft.train(lm, tokenizer, **decoding)
    sft_policy.complete(conversations[:1])  # warm-up: the first forward repacks weights and must not count as slow
    sft_record = records[0]
    if sft_record is None:
        run = start(first, **sft_policy.parameters_report())
        sft_record = evaluate_policy(sft_policy, *shared, run=run, output_dir=args.output_dir, policy_lm=lm)
        speed = sft_record["tokens_per_second"]
    else:  # speeds are compared within one run only: the machine may have been busier when the record was made
        completions = sft_policy.complete(conversations)
        speed = sum(map(len, completions.token_ids)) / completions.seconds
    results = {"output_dir": args.output_dir, "baseline_record": sft_record, "tokens_per_second_sft": speed}

    for run, trained in pending:
        if not isinstance(trained, Trained):
            continue
        print(f"{run.method} ({run.variant}), seed {run.seed}: {trained.folder}")
        if run.method == "proxy":
            model = ProxyModelForCausalLM.from_pretrained(lm, trained.folder)
            threshold = trained.settings.get("threshold")  # where it is not the proxy's own
            if threshold is not None:
                model.proxy.config = dataclasses.replace(model.proxy_config, threshold=threshold)
            policy_lm = model if model.proxy_config.features == "prefix" else None
            policy = ProxyPolicy(model, tokenizer, **decoding)
            run = start(run, **policy.parameters_report())
            record = evaluate_policy(policy, *shared, run=run, policy_lm=policy_lm, **results)
            if threshold is None and (card := Path(trained.folder, "README.md")).is_file():
                add_results(card, record)
        else:
            policy = load_trained(trained.folder, lm, tokenizer, **decoding)
            run = start(run, **policy.parameters_report())
            judges = (prompts, reward, gold_reward, policy.frozen, tokenizer)
            evaluate_policy(policy, *judges, run=run, policy_lm=policy.model, **results)
            policy.close()

    pending_n = [(run, n) for run, n in pending if run.method == "best_of_n"]
    if pending_n:
        largest = max(n for _, n in pending_n)
        print(f"best-of-n: {largest} samples of every prompt")
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        policy = best_of_n.train(lm, tokenizer, reward, n=largest, **sampling, **decoding)
        pending_n = [(start(run, **policy.parameters_report()), n) for run, n in pending_n]
        samples = policy.sample(conversations, **columns)
        for run, n in pending_n:
            evaluate_completions(best_of_n.best_of(samples, n), *shared, run=run, **results)


def draw(output_dir: str, trained: list[Trained]) -> None:
    """Tables, plots, samples and report, from the records alone (and the training logs)."""
    records = read_records(output_dir)
    paths = draw_all(records, output_dir)
    curves: dict[str, list[TrainingLog]] = {}
    for one in trained:
        if one.log and one.method != "dpo":  # DPO sees no reward while it trains
            curves.setdefault(f"{one.method} ({one.variant})", []).append(one.log)
    if curves:
        paths.append(plot_training_curve(curves, Path(output_dir, "plots", "training_curve")))
    write_text(Path(output_dir, "samples.md"), samples_markdown(records))
    write_text(Path(output_dir, "report.md"), report_markdown(records, paths, output_dir))
    print_summary(records)
    print(f"All tables and samples: {os.path.join(output_dir, 'report.md')}")


def main(args: CompareArguments, model_args: ModelConfig) -> None:
    """Checks everything that can be checked before a model is loaded, evaluates, draws."""
    hold(args.output_dir)
    trained = [read_proxy(name) for name in args.proxies] if "proxy" in args.methods else []
    trained += [read_baseline(folder) for folder in args.baselines]
    prompts = select_prompts(args)
    trained += train_missing(args)
    evaluate(args, model_args, prompts, plan(args, model_args, trained, prompts))
    draw(args.output_dir, trained)


if __name__ == "__main__":
    run_script("compare", lambda: main(*make_parser().parse_args_and_config()), goes_on=True)
