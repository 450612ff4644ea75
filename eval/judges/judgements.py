"""A judge's decisions about one record: a JSON file next to the records, which never change.

`<output_dir>/judgements/<judge>/<name of the record's file>`, one per judge and record.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, get_type_hints

import numpy as np

from eval.comparison import Comparison, kind_title, label, mean_over_seeds
from eval.judges.pairwise import Verdicts
from eval.records import Run
from eval.report.tables import with_interval
from eval.stats import Interval, seeds_rate_ci, win_rate
from trl_proxy.core.values import type_flaw
from trl_proxy.files import write_text


@dataclass(kw_only=True)
class Judgement:
    """The verdicts on one method and seed against SFT, and what they cost. Intervals are `[low, high]` at 95 %.

    A key that does not apply is null. Tokens and cost cover every answer behind the verdicts, including answers paid
    for in an earlier run.
    """

    judge: str
    settings: dict  # what decides the judge's answers: its prompt's hash, request, dtype, ...
    method: str
    variant: str | None
    seed: int
    n_prompts: int
    prompts_sha256: str  # of the records
    pairs_sha256: str  # of the texts that were judged
    win_rate: float  # a tie counts half
    ci95: Interval  # Wilson
    tie_rate: float
    disagreement_rate: float | None  # pairs whose two orders got different verdicts
    unparsed: int  # answers that were not A, B or tie
    by_kind: dict[str, dict]  # kind -> n_prompts, win_rate, ci95, tie_rate
    verdicts: list[float]  # 1 win, 0.5 tie, 0 loss
    answers: list[list[str | None] | None]  # response shown as A, reference shown as A; null if nobody was asked
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None  # in the currency of the prices that were given
    versions: dict[str, str]
    git_commit: str | None
    command: str
    judged_at: str  # ISO 8601

    def write(self, path: Path) -> None:
        """Writes the judgement."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False))


class _JudgedKind(TypedDict):
    n_prompts: int
    win_rate: float
    ci95: tuple[float, float]
    tie_rate: float


# The types of a judgement's keys in its file.
_IN_FILE = TypedDict(  # type: ignore[misc]
    "_IN_FILE", get_type_hints(Judgement) | {"ci95": tuple[float, float], "by_kind": dict[str, _JudgedKind]}
)


def record_name(record: dict) -> str:
    """Name of a record's file, e.g. `proxy-prefix-seed0.json`."""
    return Run(**{name: record[name] for name in Run.__dataclass_fields__}).path("").name


def judgement_path(judge: str, record: dict, output_dir: str | os.PathLike) -> Path:
    """Path of a judge's judgement of a record."""
    return Path(output_dir) / "judgements" / re.sub(r"[^\w.=-]+", "_", judge) / record_name(record)


def pairs_sha256(record: dict, sft: dict) -> str:
    """Hash of everything that a judge reads: prompts, responses, references."""
    texts = [record["prompts"], record["responses"], sft["responses"]]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=True).encode()).hexdigest()


def check_comparable(comparison: Comparison) -> dict:
    """The SFT record that the others are judged against.

    Raises:
        ValueError: if there is none, or records are of other prompts.
    """
    sft = comparison.sft
    if sft is None:
        raise ValueError("no SFT record to judge against: evaluate sft by scripts/compare.py first.")
    for record in comparison.records:
        if record["prompts"] != sft["prompts"]:
            name = f"{label(record)}, seed {record['seed']}"
            raise ValueError(
                f"the record of {name} has other prompts than SFT's: evaluate both again with --overwrite of "
                "scripts/compare.py."
            )
    return sft


def summarise_verdicts(verdicts: Verdicts, kinds: list[str] | None) -> dict:
    """The rates of a [`Judgement`], over all prompts and by kind."""

    def rates(scores: list[float]) -> dict:
        wins = win_rate(scores, [0.5] * len(scores))
        return {"win_rate": wins.rate, "ci95": wins.ci95, "tie_rate": wins.tie_rate}

    by_kind = {}
    for kind in sorted(set(kinds or [])):
        scores = [score for score, k in zip(verdicts.scores, kinds, strict=True) if k == kind]
        by_kind[kind] = {"n_prompts": len(scores), **rates(scores)}
    asked = any(pair is not None for pair in verdicts.answers)
    return {
        **rates(verdicts.scores),
        "disagreement_rate": verdicts.disagreements / len(verdicts.scores) if asked else None,
        "unparsed": verdicts.unparsed,
        "by_kind": by_kind,
        "verdicts": verdicts.scores,
        "answers": [None if pair is None else list(pair) for pair in verdicts.answers],
        "prompt_tokens": verdicts.prompt_tokens,
        "completion_tokens": verdicts.completion_tokens,
    }


def read_judgements(comparison: Comparison, output_dir: str | os.PathLike) -> list[dict]:
    """All judgements of these records, by file name.

    Raises:
        ValueError: if one is damaged, or of other responses than the records have now.
    """
    sft, judgements = check_comparable(comparison), []
    by_name = {record_name(record): record for record in comparison.records}
    for path in sorted((Path(output_dir) / "judgements").glob("*/*.json")):
        judgement = read_judgement(path)
        record = by_name.get(path.name)
        if record is None or judgement["pairs_sha256"] != pairs_sha256(record, sft):
            raise ValueError(f"{path} judges responses that are no longer there: delete it, or judge again.")
        judgements.append(judgement)
    return judgements


def read_judgement(path: Path) -> dict:
    """One judgement.

    Raises:
        ValueError: if the file is no judgement.
    """
    try:
        judgement = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): delete it, and judge again.") from None
    if not isinstance(judgement, dict) or Judgement.__dataclass_fields__.keys() - judgement.keys():
        raise ValueError(f"{path} is no judgement of this version: delete it, and judge again.")
    if flaw := type_flaw(judgement, _IN_FILE, "it"):
        raise ValueError(f"{path} is damaged ({flaw}): delete it, and judge again.")
    return judgement


def judgement_table(judgements: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Headers and text cells, a row per judge and method: all its seeds together, as in the report's tables."""
    kinds = sorted({kind for judgement in judgements for kind in judgement["by_kind"]})
    headers = ["judge", "method", "seeds", "win rate", *map(kind_title, kinds), "ties", "orders disagree", "unparsed"]
    headers += ["tokens", "cost"]
    groups: dict[tuple[str, str], list[dict]] = {}
    for judgement in judgements:
        groups.setdefault((judgement["judge"], label(judgement)), []).append(judgement)

    rows = []
    for (judge, name), group in groups.items():
        interval = group[0]["ci95"]
        if len(group) > 1:
            interval = seeds_rate_ci(np.stack([judgement["verdicts"] for judgement in group]))
        disagree = mean_over_seeds(group, "disagreement_rate")
        tokens = [j[key] for j in group for key in ("prompt_tokens", "completion_tokens")]
        costs = [j["cost"] for j in group]
        rows.append(
            [
                judge,
                name,
                str(len(group)),
                with_interval(mean_over_seeds(group, "win_rate"), interval, ".2f"),
                *[f"{mean_over_seeds(group, 'by_kind', kind, 'win_rate'):.2f}" for kind in kinds],
                f"{mean_over_seeds(group, 'tie_rate'):.0%}",
                "n/a" if disagree is None else f"{disagree:.0%}",
                str(sum(j["unparsed"] for j in group)),
                "n/a" if None in tokens else f"{sum(tokens):,}",
                "n/a" if None in costs else f"{sum(costs):.2f}",
            ]
        )
    return headers, rows
