"""Plans the evaluations of a comparison, runs those that have no record, and writes its report."""

import dataclasses
import os
from pathlib import Path

from datasets import Dataset
from trl import ModelConfig

from baselines.best_of_n import BestOfNPolicy, best_of
from baselines.proxy import ProxyPolicy
from baselines.sft import GreedyPolicy
from baselines.training import load_trained
from eval.comparison import Comparison
from eval.harness import evaluate_completions, evaluate_policy
from eval.jobs import CompareArguments, decode_as_trained, evaluation_jobs, existing_record, select_prompts
from eval.plots.comparison import draw_all
from eval.plots.training import plot_training_curve
from eval.records import Run
from eval.report.tables import print_summary, report_markdown, samples_markdown
from eval.trained import TrainedRun, read_baseline, read_proxy
from eval.training_logs import TrainingLog
from eval.trainings import train_missing
from trl_proxy import ProxyModelForCausalLM
from trl_proxy.devices import best_device
from trl_proxy.files import write_text
from trl_proxy.loading import load_reward
from trl_proxy.modeling.card import add_results
from trl_proxy.prompts import check_prompts
from trl_proxy.rewards.caller import RewardCaller
from trl_proxy.runs.arguments import FrozenModelConfig, add_system_prompt, load_policy, to_device
from trl_proxy.runs.parsing import RecipeParser
from trl_proxy.runs.process import lock_folder


def make_parser() -> RecipeParser:
    return RecipeParser((CompareArguments, FrozenModelConfig), description=__doc__.partition("\n")[0])


def with_start_time(run: Run, **facts) -> Run:
    """The run with its start time and the facts that only the loaded model tells."""
    return dataclasses.replace(run, started_at="", **facts)


class Evaluation:
    """The prompts, rewards and LM that all jobs of a comparison share."""

    def __init__(self, args: CompareArguments, model_args: ModelConfig, prompts: Dataset, run: Run):
        self.args, self.prompts, device = args, prompts, best_device(args.use_cpu)
        self.reward, self.gold_reward = (  # before the LM: they are small, and a wrong name fails early
            None if name is None else self._load_reward(name, device)
            for name in (run.reward_model, run.gold_reward_model)
        )
        lm, self.tokenizer = load_policy(model_args, args, device)
        self.lm = to_device(lm, device)
        self.decoding = args.decoding_of(self.lm, self.tokenizer, args.max_new_tokens)
        where = f"{args.dataset_name} ({args.split})"
        check_prompts(prompts, where, self.decoding.encode, self.decoding.max_positions, args.max_new_tokens)
        self.policy = {"batch_size": args.batch_size, "decoding": self.decoding}
        self.results: dict = {"output_dir": args.output_dir}

    def _load_reward(self, name: str, device) -> RewardCaller:
        trusted = self.args.trust_remote_code
        reward = load_reward(name, batch_size=self.args.batch_size, device=device, trust_remote_code=trusted)
        caller = RewardCaller(reward, chat_template_kwargs=self.args.chat_template_kwargs)
        caller.check(self.prompts.column_names, self.prompts["prompt"][0])
        return caller

    def _shared(self, lm=None):
        return self.prompts, self.reward, self.gold_reward, lm or self.lm, self.decoding

    def sft(self, run: Run, record: dict | None) -> None:
        """The LM itself, which the others are measured against. If it has a record, only its speed is measured."""
        policy = GreedyPolicy(self.lm, self.tokenizer, **self.policy)
        conversations = self.prompts["prompt"][:]
        policy.complete(conversations[:1])  # warm-up: the first forward repacks weights and must not count as slow
        if record is None:
            run = with_start_time(run, **policy.parameters_report())
            record = evaluate_policy(policy, *self._shared(), run=run, policy_lm=self.lm, **self.results)
            speed = record["tokens_per_second"]
        else:  # speeds are compared within one run only: the machine may have been busier when the record was made
            completions = policy.complete(conversations)
            speed = sum(map(len, completions.token_ids)) / completions.seconds
        self.results |= {"baseline_record": record, "tokens_per_second_sft": speed}

    def proxy(self, run: Run, one: TrainedRun) -> None:
        """A trained proxy; its result goes into its model card."""
        model = ProxyModelForCausalLM.from_pretrained(self.lm, one.folder)
        threshold = one.settings.get("threshold")  # if it is not the proxy's own
        if threshold is not None:
            model.proxy.config = dataclasses.replace(model.proxy_config, threshold=threshold)
        policy_lm = model if model.proxy_config.features == "prefix" else None
        policy = ProxyPolicy(model, self.tokenizer, **self.policy)
        run = with_start_time(run, **policy.parameters_report())
        record = evaluate_policy(policy, *self._shared(), run=run, policy_lm=policy_lm, **self.results)
        if threshold is None and (card := Path(one.folder, "README.md")).is_file():
            add_results(card, record)

    def baseline(self, run: Run, one: TrainedRun) -> None:
        """A trained LM, judged by the LM as it was."""
        policy = load_trained(one.folder, self.lm, self.tokenizer, **self.policy)
        run = with_start_time(run, **policy.parameters_report())
        shared = self._shared(policy.frozen)
        evaluate_policy(policy, *shared, run=run, policy_lm=policy.model, **self.results)
        policy.close()

    def best_of_n(self, runs: list[tuple[Run, int]]) -> None:
        """Every n, from the samples of the largest."""
        args, largest = self.args, max(n for _, n in runs)
        print(f"best-of-n: {largest} samples of every prompt")
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        policy = BestOfNPolicy(self.lm, self.tokenizer, self.reward, n=largest, **sampling, **self.policy)
        started = [(with_start_time(run, **policy.parameters_report()), n) for run, n in runs]
        columns = {name: self.prompts[name][:] for name in self.prompts.column_names if name != "prompt"}
        samples = policy.sample(self.prompts["prompt"][:], **columns)
        for run, n in started:
            evaluate_completions(best_of(samples, n), *self._shared(), run=run, **self.results)


def evaluate(
    args: CompareArguments,
    model_args: ModelConfig,
    prompts: Dataset,
    jobs: list[tuple[Run, TrainedRun | int | None]],
) -> None:
    """Evaluates the jobs that have no record yet; the first is SFT."""
    records = [None if args.overwrite else existing_record(run, args.output_dir) for run, _ in jobs]
    pending = [job for job, record in zip(jobs, records, strict=True) if record is None]
    print(f"{len(jobs) - len(pending)} of {len(jobs)} records are there already, {len(pending)} to go.")
    if not pending:
        return
    evaluation = Evaluation(args, model_args, prompts, jobs[0][0])
    evaluation.sft(jobs[0][0], records[0])
    for run, one in pending:
        if isinstance(one, TrainedRun):
            print(f"{run.method} ({run.variant}), seed {run.seed}: {one.folder}")
            (evaluation.proxy if run.method == "proxy" else evaluation.baseline)(run, one)
    if best := [(run, n) for run, n in pending if isinstance(n, int)]:
        evaluation.best_of_n(best)


def write_report(output_dir: str, trained: list[TrainedRun]) -> None:
    """Tables, plots, samples and report, from the records alone (and the training logs)."""
    comparison = Comparison.read(output_dir)
    paths = draw_all(comparison, output_dir)
    curves: dict[str, list[TrainingLog]] = {}
    for one in trained:
        if one.log and one.method != "dpo":  # DPO sees no reward while it trains
            curves.setdefault(f"{one.method} ({one.variant})", []).append(one.log)
    if curves:
        paths.append(plot_training_curve(curves, Path(output_dir, "plots", "training_curve")))
    write_text(Path(output_dir, "samples.md"), samples_markdown(comparison))
    write_text(Path(output_dir, "report.md"), report_markdown(comparison, paths, output_dir))
    print_summary(comparison)
    print(f"All tables and samples: {os.path.join(output_dir, 'report.md')}")


def compare(args: CompareArguments, model_args: ModelConfig) -> None:
    """Checks everything that can be checked before a model is loaded, evaluates, draws."""
    lock_folder(args.output_dir)
    trained = [read_proxy(name) for name in args.proxies] if "proxy" in args.methods else []
    trained += [read_baseline(folder) for folder in args.baselines]
    prompts = select_prompts(args)
    trained += train_missing(args.recipes, args.seeds, args.train_settings, args.output_dir, args.launch)
    decode_as_trained(args, trained)
    prompts = add_system_prompt(prompts, args.system_prompt)
    evaluate(args, model_args, prompts, evaluation_jobs(args, model_args, trained, prompts))
    write_report(args.output_dir, trained)
