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

from eval.comparison import Comparison, kind_title, label, label_rate, mean_over_seeds
from eval.stats import Interval, paired_delta

NOTES = (
    "Deltas (Δ) and win rates are against greedy SFT, paired by prompt; a tie counts as half a win. Brackets are 95 % "
    "intervals: over prompts for one seed (BCa bootstrap, Wilson for win rates), over seeds and prompts together for "
    "several (both as samples, with Student's t). Gold: a reward that no method trains on. "
    "LM log-prob: nats per response token under the frozen LM. LM forwards: per response token. Speed: tokens per "
    "second over SFT's in the same run. Refusals: by phrases, see `eval/refusals.py`."
)
READERS_NOTE = (
    " Readers: share of the pairs that blind readers decided for the method and not for SFT. True refusals and "
    "nonsense: share of the responses that they labelled so."
)


def notes(comparison: Comparison) -> str:
    """What the tables' columns mean."""
    return NOTES + (READERS_NOTE if comparison.is_read else "")


def number(value: float | None, form: str) -> str:
    """A number by the format `form`, `n/a` for none."""
    return "n/a" if value is None else format(value, form)


def with_interval(value: float | None, interval: Interval | None, form: str) -> str:
    """`0.41 [0.30, 0.52]` by the format `form`; the value alone if there is no interval."""
    if value is None or interval is None:
        return number(value, form)
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def _trainable(record: dict) -> str:
    trainable, total = record["trainable_parameters"], record["total_parameters"]
    if trainable is None:
        return "n/a"
    share = f" ({trainable / total:.2%})" if total and trainable else ""
    return f"{trainable:,}{share}"


READER_LABELS = (("R", "true refusals"), ("N", "nonsense"))


def _label_rate(group: list[dict], letter: str, kind: str) -> float | None:
    """The mean over the seeds that were read."""
    found = [rate for record in group if (rate := label_rate(record, letter, kind)) is not None]
    return float(np.mean(found)) if found else None


def tables(comparison: Comparison) -> list[tuple[list[str], list[list[str]]]]:
    """Two tables as headers and text cells, a row per method and variant: what was gained, and at what cost.

    What blind readers say is there if they read any of the records.
    """
    kinds, read = comparison.kinds, comparison.is_read
    gains = [
        "method",
        "seeds",
        "reward",
        "Δ vs SFT",
        "win rate",
        *(["readers"] if read else []),
        *[f"Δ {kind_title(kind)}" for kind in kinds],
        "gold Δ",
    ]
    costs = ["method", "trainable", *[f"refusals {kind_title(kind)}" for kind in kinds or ["all"]]]
    labelled = [(letter, name, kind) for letter, name in READER_LABELS for kind in kinds or ["all"] if read]
    costs += [f"{name} {kind_title(kind)}" for _, name, kind in labelled]
    costs += ["LM log-prob", "LM forwards", "speed"]
    gain_rows, cost_rows, nothing = [], [], (None, None)
    for name, group in comparison.groups.items():
        win_rate = comparison.win_rate(group) or nothing
        refusals = [mean_over_seeds(group, "by_kind", kind, "refusal_rate") for kind in kinds] or [
            mean_over_seeds(group, "refusal_rate")
        ]
        speed, speed_sft = mean_over_seeds(group, "tokens_per_second"), mean_over_seeds(group, "tokens_per_second_sft")
        gain_rows.append(
            [
                name,
                str(len(group)),
                number(mean_over_seeds(group, "reward_mean"), ".2f"),
                with_interval(*(comparison.gain(group) or nothing), "+.2f"),
                with_interval(*win_rate, ".2f"),
                *([with_interval(*(comparison.reader_win_rate(group) or nothing), ".2f")] if read else []),
                *[with_interval(*(comparison.gain(group, kind) or nothing), "+.2f") for kind in kinds],
                with_interval(*(comparison.gain(group, gold=True) or nothing), "+.2f"),
            ]
        )
        cost_rows.append(
            [
                name,
                _trainable(group[0]),
                *[number(rate, ".0%") for rate in refusals],
                *[number(_label_rate(group, letter, kind), ".0%") for letter, _, kind in labelled],
                number(mean_over_seeds(group, "lm_logprob_per_token"), ".2f"),
                number(mean_over_seeds(group, "lm_forwards_per_token"), ".2f"),
                number(speed / speed_sft if speed_sft else None, ".2f"),
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


def print_summary(comparison: Comparison, console: Console | None = None) -> None:
    """The comparison in the terminal: a small table, then three prompts as the LM and a trained method answer."""
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(_title(comparison), soft_wrap=True, highlight=False)
    (gains, gain_rows), (costs, cost_rows) = tables(comparison)
    methods = [row[0].partition(" (")[0] for row in gain_rows]
    shown = ["reward", "Δ vs SFT", "gold Δ"] + ["readers"] * comparison.is_read
    rows = []
    for method, gain, cost in zip(methods, gain_rows, cost_rows):
        name = method if methods.count(method) == 1 and method != "best_of_n" else gain[0]
        cells = [gain[gains.index(title)] for title in shown]
        cells = ["sft, the LM" if method == "sft" else name, *cells, cost[costs.index("LM forwards")]]
        rows.append([cell.replace("n/a", "") for cell in cells])
    headers = ["method", "reward", "gain [95 %]", "gold gain [95 %]"] + ["readers [95 %]"] * comparison.is_read
    print_table([*headers, "LM/token"], rows, console=console)
    console.print("Gains: over the LM's own greedy answers. LM/token: runs of the LM per token.", style="dim")
    if comparison.is_read:
        console.print("Readers: share of the decided pairs that blind readers gave the method.", style="dim")
    console.print()
    print_examples(comparison, console)


def print_examples(comparison: Comparison, console: Console) -> None:
    """Three prompts with the answers of the LM and of the first trained method under each other, and their rewards.

    These are the first two harm-adjacent prompts and the first everyday one; prompts on which they differ come first.
    """
    sft, records = comparison.sft, comparison.records
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


def _title(comparison: Comparison) -> str:
    record = comparison.records[0]
    return f"{record['model']}, reward {record['reward_model']}, {record['n_prompts']} prompts of {record['dataset']}"


def markdown_table(headers: list[str], rows: list[list[str]], *, left: int = 1) -> str:
    """A Markdown table of plain text cells; the first `left` columns to the left, the others to the right."""
    lines = [headers, ["---"] * left + ["---:"] * (len(headers) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escape(text: str) -> str:
    """Text that shows as it is in a Markdown table cell: no HTML, no markup, no new row."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"\r\n|\r|\n", "<br>", escaped)


def samples_markdown(comparison: Comparison, *, per_kind: int = 5, worst: int = 3) -> str:
    """Responses of all methods to the same prompts: the first prompts of each kind, not hand-picked, and those on
    which a method lost most against SFT."""
    shown = [group[0] for group in comparison.groups.values()]  # the first seed of each method
    first, sft = shown[0], comparison.sft
    lines = ["# Samples", "", "One seed per method. Responses are cut at `max_new_tokens`."]

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


def report_markdown(comparison: Comparison, plots: list[Path], output_dir: str | os.PathLike) -> str:
    """The report: table, plots (paths relative to the output folder), and what produced the records."""
    records = comparison.records
    record = records[0]
    lines = ["# Comparison", "", _title(comparison) + f", at most {record['max_new_tokens']} new tokens.", ""]
    for headers, rows in tables(comparison):
        lines += [markdown_table(headers, rows), ""]
    lines += [notes(comparison), ""]
    lines += [f"![{path.stem.replace('_', ' ')}]({path.relative_to(output_dir).as_posix()})" for path in plots]
    lines += ["", "Responses side by side: [samples.md](samples.md).", "", "## Provenance", ""]
    lines += [f"- prompts: sha256 `{record['prompts_sha256']}`"]
    for key in ("command", "git_commit"):
        values = sorted({str(r[key]) for r in records})
        lines += [f"- {key}: `{value}`" for value in values]
    lines += [f"- versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}"]
    return "\n".join(lines) + "\n"
