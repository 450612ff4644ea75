"""Writes and reads the published results, `docs/results/records.jsonl`, and groups them as rows of tables.

A line of the file is a record without the values of single prompts, the intervals of several seeds, or a result of the
benchmark. Intervals need the values of single prompts, so [`write_summaries`] computes them.
"""

import json
from pathlib import Path
from typing import NamedTuple

from eval.comparison import Comparison, kind_title, mean_over_seeds
from eval.records import PER_PROMPT
from trl_proxy.files import write_text

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "results" / "records.jsonl"
SHOWN_KINDS = ("everyday", "harm_adjacent")
NAMES = {"sft": "SFT, greedy", "dpo": "DPO-LoRA", "ppo": "PPO-LoRA", "rloo": "RLOO-LoRA", "grpo": "GRPO-LoRA"}


def write_summaries(comparison: Comparison, collection: str, machine: str, path: str | Path | None = None) -> None:
    """Writes a comparison's lines to a file of published results, in place of this collection's old lines.

    Args:
        collection: name of these lines, e.g. `compare`.
        machine: a name for the machine, as the documentation explains it.
        path: the file, by default the documentation's; it may not exist yet.
    """
    path = Path(path or RECORDS)
    lines = [line for line in read_lines(path) if line["collection"] != collection] if path.is_file() else []
    for name, group in comparison.groups.items():
        own = {"collection": collection, "group": name}
        lines += [
            {**own, "machine": machine, **{k: v for k, v in record.items() if k not in PER_PROMPT}} for record in group
        ]
        if len(group) > 1:
            found = {"gain": comparison.gain(group), "gold_gain": comparison.gain(group, gold=True)}
            found |= {f"gain_{kind}": comparison.gain(group, kind) for kind in comparison.kinds}
            found["win_rate"] = comparison.win_rate(group)
            found["reader_win_rate"] = comparison.reader_win_rate(group)
            intervals = {key: value[1] for key, value in found.items() if value is not None}
            lines.append({**own, "seeds": [record["seed"] for record in group], "intervals": intervals})
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))


def write_reader_lines(results: dict, path: str | Path | None = None) -> None:
    """Writes what blind readers said, as [`eval.judges.readers.results.read_results`] gives it, to a file of published
    results: a line for each two methods and kind of prompts, in place of the old lines of the same two."""
    path = Path(path or RECORDS)
    titles = {duel["title"] for duel in results["duels"]}
    lines = read_lines(path) if path.is_file() else []
    lines = [line for line in lines if line["collection"] != "readers" or line["group"] not in titles]
    for duel in results["duels"]:
        for kind, found in (duel["by_kind"] or {"all": duel}).items():
            counts = {"first_wins": found["wins"], "second_wins": found["losses"], "ties": found["ties"]}
            lines.append({"collection": "readers", "group": duel["title"], "kind": kind_title(kind), **counts})
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))


def read_lines(path: str | Path | None = None) -> list[dict]:
    """The lines of a file of published results, by default the documentation's."""
    return [json.loads(line) for line in Path(path or RECORDS).read_text(encoding="utf-8").splitlines()]


class Row(NamedTuple):
    """The records of one method or setting, and the intervals over its seeds if there are several."""

    name: str
    records: list[dict]
    intervals: dict[str, list[float] | None]

    def mean(self, *keys: str) -> float | None:
        """[`mean_over_seeds`] of its records."""
        return mean_over_seeds(self.records, *keys)

    def seed(self, k: int) -> "Row":
        """One of its seeds as a row, with that record's intervals."""
        record = next(record for record in self.records if record["seed"] == k)
        return Row(f"{self.name}, seed {k}", [record], _own_intervals(record))

    def with_seeds(self, seeds: tuple[int, ...]) -> "Row":
        return self._replace(records=[record for record in self.records if record["seed"] in seeds])


def _own_intervals(record: dict) -> dict[str, list[float] | None]:
    found = {"gain": record["delta_ci95"], "gold_gain": record["gold_delta_ci95"], "win_rate": record["win_rate_ci95"]}
    found["reader_win_rate"] = record.get("reader_win_rate_ci95")
    return (
        found
        | {f"gain_{kind}": of["delta_ci95"] for kind, of in record["by_kind"].items()}
        | {f"gold_gain_{kind}": of.get("gold_delta_ci95") for kind, of in record["by_kind"].items()}
    )


class Published:
    """The published results by collection."""

    def __init__(self, lines: list[dict]):
        self.lines = lines

    def rows(self, collection: str) -> dict[str, Row]:
        """Group -> its row."""
        rows: dict[str, Row] = {}
        for line in self.lines:
            if line["collection"] == collection and "method" in line:
                group = line["group"]
                rows.setdefault(group, Row(NAMES.get(line["method"], group), [], {})).records.append(line)
        for line in self.lines:
            if line["collection"] == collection and "intervals" in line:
                rows[line["group"]].intervals.update(line["intervals"])
        for row in rows.values():
            if len(row.records) == 1:
                row.intervals.update(_own_intervals(row.records[0]))
        return rows

    def benchmarks(self) -> list[dict]:
        return [line for line in self.lines if line["collection"] == "benchmark"]
