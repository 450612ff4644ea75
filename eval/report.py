"""The comparison as a terminal table, as Markdown, and as samples, from the records alone."""

import html
import os
import re
import sys
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.stats import Interval, paired_delta, seeds_mean_ci, seeds_rate_ci, win_scores

NOTES = (
    "Deltas (Δ) and win rates are against greedy SFT, paired by prompt; a tie counts as half a win. Brackets are 95 % "
    "intervals: over prompts for one seed (BCa bootstrap, Wilson for win rates), over seeds and prompts together for "
    "several (both as samples, with Student's t). Gold: a reward that no method trains on. "
    "LM log-prob: nats per response token under the frozen LM. LM forwards: per response token. Speed: tokens per "
    "second over SFT's in the same run. Refusals: by phrases, see `eval/refusals.py`."
)


def label(record: dict) -> str:
    """Name of a method in tables and plots, e.g. `best_of_n (n=8)`."""
    return record["method"] if record["variant"] is None else f"{record['method']} ({record['variant']})"


def group_records(records: list[dict]) -> dict[str, list[dict]]:
    """The records of each method and variant, all seeds together: SFT first, the others by name, n in its order.

    Raises:
        ValueError: if the records are not over the same prompts, LM, reward and length.
    """
    for name in ("prompts_sha256", "model", "reward_model", "max_new_tokens"):
        if len(values := sorted({str(record[name]) for record in records})) > 1:
            raise ValueError(
                f"the records differ in {name} ({', '.join(values)}) and cannot be compared: evaluate all of them "
                "again with --overwrite, or keep them in different output folders."
            )

    def key(record):  # n=2 before n=16
        padded = re.sub(r"\d+", lambda number: number[0].zfill(9), label(record))
        return record["method"] != "sft", padded, record["seed"]

    groups: dict[str, list[dict]] = {}
    for record in sorted(records, key=key):
        groups.setdefault(label(record), []).append(record)
    return groups


def find_sft(records: list[dict]) -> dict | None:
    """The SFT record, None where there is none."""
    return next((record for record in records if record["method"] == "sft"), None)


def all_kinds(records: list[dict]) -> list[str]:
    """Kinds of prompts in the records, sorted."""
    return sorted({kind for record in records for kind in record["by_kind"]})


def kind_title(kind: str) -> str:
    """`harm_adjacent` -> `harm-adjacent`."""
    return kind.replace("_", "-")


def delta_over_seeds(
    group: list[dict], sft: dict | None, kind: str | None = None, gold: bool = False
) -> tuple[float, Interval | None] | None:
    """Mean paired gain over SFT of one method's seeds and its interval; None where there is nothing to pair with.

    Args:
        group: records of one method and variant.
        sft: the SFT record.
        kind: prompts of this kind only.
        gold: by the reward that no method trains on.
    """
    name = "gold_rewards" if gold else "rewards"
    if sft is None or group[0]["method"] == "sft" or None in [record[name] for record in [sft, *group]]:
        return None
    if len(group) == 1:
        source, prefix = group[0] if kind is None else group[0]["by_kind"][kind], "gold_" if gold else ""
        return source[f"{prefix}delta_vs_sft"], source[f"{prefix}delta_ci95"]
    rows = [i for i in range(sft["n_prompts"]) if kind is None or sft["kinds"][i] == kind]
    deltas = np.stack([paired_delta(record[name], sft[name])[rows] for record in group])  # (seeds, prompts)
    return float(deltas.mean()), seeds_mean_ci(deltas)


def win_rate_over_seeds(group: list[dict], sft: dict | None) -> tuple[float, Interval | None] | None:
    """Win rate against SFT of one method's seeds, ties as half, and its interval; None where there is no pair.

    Args:
        group: records of one method and variant.
        sft: the SFT record.
    """
    if sft is None or group[0]["method"] == "sft":
        return None
    if len(group) == 1:
        return group[0]["win_rate_vs_sft"], group[0]["win_rate_ci95"]
    scores = np.stack([win_scores(record["rewards"], sft["rewards"]) for record in group])
    return float(scores.mean()), seeds_rate_ci(scores)


def mean_over_seeds(group: list[dict], *keys: str) -> float | None:
    """Mean over seeds of a (nested) key; None where a record has none."""
    values = []
    for record in group:
        for key in keys:
            record = record[key]
        values.append(record)
    return None if None in values else float(np.mean(values))


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def with_interval(value: float | None, interval: Interval | None, form: str) -> str:
    """`0.41 [0.30, 0.52]` by the format `form`; the value alone where there is no interval."""
    if value is None or interval is None:
        return _number(value, form)
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def _trainable(record: dict) -> str:
    trainable, total = record["trainable_parameters"], record["total_parameters"]
    if trainable is None:
        return "n/a"
    share = f" ({trainable / total:.2%})" if total and trainable else ""
    return f"{trainable:,}{share}"


def tables(records: list[dict]) -> list[tuple[list[str], list[list[str]]]]:
    """Two tables as headers and text cells, a row per method and variant: what was gained, and at what cost."""
    sft, kinds = find_sft(records), all_kinds(records)
    gains = [
        "method",
        "seeds",
        "reward",
        "Δ vs SFT",
        "win rate",
        *[f"Δ {kind_title(kind)}" for kind in kinds],
        "gold Δ",
    ]
    costs = ["method", "trainable", *[f"refusals {kind_title(kind)}" for kind in kinds or ["all"]]]
    costs += ["LM log-prob", "LM forwards", "speed"]
    gain_rows, cost_rows, nothing = [], [], (None, None)
    for name, group in group_records(records).items():
        win_rate = win_rate_over_seeds(group, sft) or nothing
        refusals = [mean_over_seeds(group, "by_kind", kind, "refusal_rate") for kind in kinds] or [
            mean_over_seeds(group, "refusal_rate")
        ]
        speed, speed_sft = mean_over_seeds(group, "tokens_per_second"), mean_over_seeds(group, "tokens_per_second_sft")
        gain_rows.append(
            [
                name,
                str(len(group)),
                _number(mean_over_seeds(group, "reward_mean"), ".2f"),
                with_interval(*(delta_over_seeds(group, sft) or nothing), "+.2f"),
                with_interval(*win_rate, ".2f"),
                *[with_interval(*(delta_over_seeds(group, sft, kind) or nothing), "+.2f") for kind in kinds],
                with_interval(*(delta_over_seeds(group, sft, gold=True) or nothing), "+.2f"),
            ]
        )
        cost_rows.append(
            [
                name,
                _trainable(group[0]),
                *[_number(rate, ".0%") for rate in refusals],
                _number(mean_over_seeds(group, "lm_logprob_per_token"), ".2f"),
                _number(mean_over_seeds(group, "lm_forwards_per_token"), ".2f"),
                _number(speed / speed_sft if speed_sft else None, ".2f"),
            ]
        )
    return [(gains, gain_rows), (costs, cost_rows)]


def print_table(
    headers: list[str], rows: list[list[str]], *, left: int = 1, width: int = 120, console: Console | None = None
) -> None:
    """A table in the terminal, the first `left` columns to the left; `width` is for a pipe, which has none."""
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=width)  # not rich's 80
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_summary(records: list[dict], console: Console | None = None) -> None:
    """The comparison in the terminal: a small table, then three prompts as the LM and a trained method answer."""
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(_title(records), soft_wrap=True, highlight=False)
    (gains, gain_rows), (costs, cost_rows) = tables(records)
    methods = [row[0].partition(" (")[0] for row in gain_rows]
    rows = []
    for method, gain, cost in zip(methods, gain_rows, cost_rows):
        name = method if methods.count(method) == 1 and method != "best_of_n" else gain[0]
        cells = [gain[gains.index(title)] for title in ("reward", "Δ vs SFT", "gold Δ")]
        cells = ["sft, the LM" if method == "sft" else name, *cells, cost[costs.index("LM forwards")]]
        rows.append([cell.replace("n/a", "") for cell in cells])
    print_table(["method", "reward", "gain [95 %]", "gold gain [95 %]", "LM/token"], rows, console=console)
    console.print("Gains: over the LM's own greedy answers. LM/token: runs of the LM per token.", style="dim")
    console.print()
    print_examples(records, console)


def print_examples(records: list[dict], console: Console) -> None:
    """Three prompts with the answers of the LM and of the first trained method under each other, and their rewards.

    These are the first two harm-adjacent prompts and the first everyday one, those before all on which they differ.
    """
    sft = find_sft(records)
    trained = next((r for r in records if r["method"] == "proxy"), None) or next(
        (r for r in records if r["method"] not in ("sft", "best_of_n")), None
    )
    if sft is None or trained is None or not sft["prompts"]:
        return
    kinds = sft["kinds"] or [None] * sft["n_prompts"]
    ordered = sorted(range(sft["n_prompts"]), key=lambda i: sft["responses"][i] == trained["responses"][i])
    by_kind = [[i for i in ordered if kinds[i] == kind] for kind in ("harm_adjacent", "everyday")]
    chosen = by_kind[0][:2] + by_kind[1][:1] or ordered[:3]
    names = ("the LM", trained["method"])
    for i in chosen:
        kind = f"  ({kind_title(kinds[i])})" if kinds[i] else ""
        console.print(Text(sft["prompts"][i], "bold"), Text(kind, "dim"), sep="")
        answers = Table.grid(padding=(0, 1))
        answers.add_column(min_width=max(map(len, names)))
        answers.add_column(justify="right", min_width=5)
        answers.add_column(overflow="fold")
        for name, record in zip(names, (sft, trained)):
            text = " ".join(record["responses"][i].split())
            answers.add_row(Text(name, "cyan"), f"{record['rewards'][i]:+.2f}", Text(text))
        console.print(answers)
        console.print()


def _title(records: list[dict]) -> str:
    record = records[0]
    return f"{record['model']}, reward {record['reward_model']}, {record['n_prompts']} prompts of {record['dataset']}"


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of plain text cells; the first column to the left, the others to the right."""
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escape(text: str) -> str:
    """Text that shows as it is in a Markdown table cell: no HTML, no markup, no new row."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"\r\n|\r|\n", "<br>", escaped)


def samples_markdown(records: list[dict], *, per_kind: int = 5, worst: int = 3) -> str:
    """Responses of all methods to the same prompts: the first prompts of each kind, not picked by anyone, and those
    where a method lost most against SFT."""
    groups = group_records(records)
    shown = [group[0] for group in groups.values()]  # the first seed of each method
    first, sft = shown[0], find_sft(records)
    lines = ["# Samples", "", "One seed per method. A response ends where `max_new_tokens` cut it."]

    def section(i: int) -> list[str]:
        rows = [[label(r), f"{r['rewards'][i]:.2f}", escape(r["responses"][i])] for r in shown]
        prompt = escape(first["prompts"][i])
        return ["", f"**{prompt}**", "", "| method | reward | response |", "| --- | ---: | --- |"] + [
            "| " + " | ".join(row) + " |" for row in rows
        ]

    kinds = first["kinds"] or ["all"] * first["n_prompts"]
    for kind in sorted(set(kinds)):
        rows = [i for i, k in enumerate(kinds) if k == kind][:per_kind]
        lines += ["", f"## {kind_title(kind).capitalize()} prompts: the first {len(rows)}"]
        lines += [line for i in rows for line in section(i)]
    for record in shown:
        if sft is None or record is sft:
            continue
        delta = paired_delta(record["rewards"], sft["rewards"])
        losses = [i for i in np.argsort(delta, kind="stable")[:worst] if delta[i] < 0]
        if losses:
            lines += ["", f"## Largest losses of {label(record)} against SFT"]
        lines += [line for i in losses for line in section(i)]
    return "\n".join(lines) + "\n"


def report_markdown(records: list[dict], plots: list[Path], output_dir: str | os.PathLike) -> str:
    """The report: table, plots (paths relative to the output folder), and what produced the records."""
    record = records[0]
    lines = ["# Comparison", "", _title(records) + f", at most {record['max_new_tokens']} new tokens.", ""]
    for headers, rows in tables(records):
        lines += [markdown_table(headers, rows), ""]
    lines += [NOTES, ""]
    lines += [f"![{path.stem.replace('_', ' ')}]({path.relative_to(output_dir).as_posix()})" for path in plots]
    lines += ["", "Responses side by side: [samples.md](samples.md).", "", "## Provenance", ""]
    lines += [f"- prompts: sha256 `{record['prompts_sha256']}`"]
    for key in ("command", "git_commit"):
        values = sorted({str(r[key]) for r in records})
        lines += [f"- {key}: `{value}`" for value in values]
    lines += [f"- versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}"]
    return "\n".join(lines) + "\n"
