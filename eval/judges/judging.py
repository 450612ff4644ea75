"""Judges as scripts/judge.py runs them: built from its flags, asked about every record that they have not judged."""

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from tqdm.auto import tqdm
from trl import ModelConfig

from eval.comparison import Comparison
from eval.judges.arguments import RECORDED, JudgeArguments
from eval.judges.judgements import (
    Judgement,
    check_comparable,
    judgement_path,
    judgement_table,
    pairs_sha256,
    read_judgement,
    read_judgements,
    summarise_verdicts,
)
from eval.judges.pairwise import (
    PROMPT_FILE,
    LocalJudge,
    PairwiseJudge,
    Verdicts,
    read_template,
    recorded_verdicts,
)
from eval.judges.readers.sittings import read_blind
from eval.records import git_commit, package_versions
from eval.report.tables import print_table
from trl_proxy.devices import best_device
from trl_proxy.loading import EMBEDDED
from trl_proxy.runs.arguments import FrozenModelConfig, load_policy, to_device
from trl_proxy.runs.parsing import RecipeParser
from trl_proxy.runs.resume import changed_keys


def make_parser() -> RecipeParser:
    return RecipeParser((JudgeArguments, FrozenModelConfig), description=__doc__.partition("\n")[0])


@dataclass(frozen=True)
class Judging:
    """A judge as this script runs it.

    Attributes:
        name: for tables and folders.
        settings: what decides its answers; a judgement counts as done only for equal ones.
        decide: `(record, sft) -> Verdicts`.
        prices: of a million prompt and reply tokens; None if nobody pays or the prices are not known.
        free: judged anew each time, because it costs nothing.
    """

    name: str
    settings: dict
    decide: Callable[[dict, dict], Verdicts]
    prices: tuple[float, float] | None = None
    free: bool = False


# The judges


def recorded_judge(kind: str, records: list[dict]) -> Judging:
    """A reward whose scores the records have."""
    key, model = RECORDED[kind]
    for record in records:
        recorded_verdicts(record, record, key)  # raises if one has no such scores
    if len(names := sorted({record[model] for record in records})) > 1:
        raise ValueError(f"the records differ in {model} ({', '.join(names)}): evaluate all of them with one.")
    return Judging(
        f"{kind} {names[0]}", {"kind": kind}, lambda record, sft: recorded_verdicts(record, sft, key), free=True
    )


def text_judge(judge: PairwiseJudge, settings: dict, prices: tuple[float, float] | None = None) -> Judging:
    """A judge that reads the texts."""

    def decide(record: dict, sft: dict) -> Verdicts:
        return judge.judge(record["prompts"], record["responses"], sft["responses"])

    return Judging(judge.name, settings, decide, prices)


def local_judge(args: JudgeArguments, model_args: ModelConfig, template: Template) -> Judging:
    """The causal LM that the model arguments name."""
    device = best_device(args.use_cpu)
    lm, tokenizer = load_policy(model_args, args, device)
    lm = to_device(lm, device)
    name = f"transformers {model_args.model_name_or_path or EMBEDDED}"
    settings = {
        "kind": "transformers",
        "prompt_sha256": sha256(template.template),
        "model_revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "load_in_4bit": model_args.load_in_4bit,
        "load_in_8bit": model_args.load_in_8bit,
    }
    if args.chat_template_kwargs:
        settings["chat_template_kwargs"] = args.chat_template_kwargs
    options = {"batch_size": args.batch_size, "chat_template_kwargs": args.chat_template_kwargs}
    return text_judge(LocalJudge(lm, tokenizer, name, template, **options), settings)


def endpoint_judge(args: JudgeArguments, template: Template) -> Judging:
    """The model behind an endpoint."""
    try:
        from eval.judges.endpoint import ApiJudge, ReplyCache
    except ImportError as error:
        raise ImportError(f'The judge openai needs {error.name}: run `pip install -e ".[judge]"`.') from error

    request = json.loads(args.judge_request)
    judge = ApiJudge(
        args.judge_model,
        ReplyCache(args.replies or Path(args.output_dir, "judgements", "replies.sqlite")),
        base_url=args.judge_base_url,
        template=template,
        request=request,
        ask_again=args.ask_again,
        concurrency=args.concurrency,
        requests_per_minute=args.requests_per_minute,
        timeout=args.timeout,
        retries=args.retries,
    )
    settings = {
        "kind": "openai",
        "prompt_sha256": sha256(template.template),
        "base_url": judge.base_url,
        "request": request,
        "ask_again": args.ask_again,
    }
    prices = None if args.price_prompt is None else (args.price_prompt, args.price_completion)
    return text_judge(judge, settings, prices)


# Judging


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_judged(judging: Judging, record: dict, sft: dict, path: Path) -> bool:
    """Whether this judgement exists.

    Raises:
        ValueError: if there is one with other settings or of other responses.
    """
    if not path.is_file():
        return False
    judgement = read_judgement(path)
    before = {**judgement["settings"], "pairs_sha256": judgement["pairs_sha256"]}
    now = {**judging.settings, "pairs_sha256": pairs_sha256(record, sft)}
    if changed := changed_keys(before, now):
        raise ValueError(
            f"{path} was judged with other settings (different: {', '.join(changed)}): choose another --output_dir, "
            "or judge again with --overwrite."
        )
    return True


def judge_record(judging: Judging, record: dict, sft: dict) -> Judgement:
    """Decides one record's pairs."""
    verdicts = judging.decide(record, sft)
    cost = None
    if judging.prices is not None and None not in (verdicts.prompt_tokens, verdicts.completion_tokens):
        prompt_price, completion_price = judging.prices
        cost = (verdicts.prompt_tokens * prompt_price + verdicts.completion_tokens * completion_price) / 1e6
    return Judgement(
        judge=judging.name,
        settings=judging.settings,
        **{key: record[key] for key in ("method", "variant", "seed", "n_prompts", "prompts_sha256")},
        pairs_sha256=pairs_sha256(record, sft),
        **summarise_verdicts(verdicts, record["kinds"]),
        cost=cost,
        versions=package_versions(),
        git_commit=git_commit(),
        command=shlex.join(sys.orig_argv),
        judged_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def judge(args: JudgeArguments, model_args: ModelConfig) -> None:
    """Checks the records and the settings, judges what is not judged yet, prints all judgements."""
    comparison = Comparison.read(args.output_dir)
    sft, records = check_comparable(comparison), comparison.records
    template = read_template(args.judge_prompt_file or PROMPT_FILE)
    others = [record for record in records if record["method"] != "sft"]
    if not others:
        raise ValueError(f"{args.output_dir} has no record but SFT's: evaluate another method by scripts/compare.py.")
    if "readers" in args.judges:
        read_blind(args, comparison)
    if args.judges == ["readers"]:
        return
    judgings = [recorded_judge(kind, records) for kind in RECORDED if kind in args.judges]
    if "openai" in args.judges:  # before the LM: a missing key should be known soon
        judgings.append(endpoint_judge(args, template))
    if "transformers" in args.judges:
        judgings.append(local_judge(args, model_args, template))
    for judging in judgings:
        paths = [judgement_path(judging.name, record, args.output_dir) for record in others]
        todo = [
            (record, path)
            for record, path in zip(others, paths, strict=True)
            if args.overwrite or judging.free or not is_judged(judging, record, sft, path)
        ]
        if not judging.free:
            print(f"{judging.name}: {len(others) - len(todo)} of {len(others)} records are judged already.")
        for record, path in tqdm(todo, desc=judging.name, unit="record"):
            judgement = judge_record(judging, record, sft)
            judgement.write(path)
            if judgement.unparsed:
                tqdm.write(
                    f"{path}: {judgement.unparsed} answers of {judging.name} were none of A, B, tie and count as ties."
                )
    print_table(*judgement_table(read_judgements(comparison, args.output_dir)), left=2, width=160)
