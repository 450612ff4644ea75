"""The tables of the documentation, printed from the published results, and from the tables of fields.

python scripts/report.py --tables                            # prints every table
python scripts/report.py --tables README.md docs/results.md  # writes them into these pages
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval.published import NAMES, SHOWN_KINDS, Published, Row, read_lines
from eval.published_columns import COLUMNS
from eval.report.tables import markdown_table, with_interval
from eval.stats import rate_ci
from trl_proxy.decoding import settings
from trl_proxy.files import write_text
from trl_proxy.trainer import fields


def table(rows: list[Row], columns: list[str], left: int = 1) -> str:
    """A Markdown table of these rows and columns of [`COLUMNS`]."""
    return markdown_table(columns, [[COLUMNS[column](row) for column in columns] for row in rows], left=left)


# The tables of the documentation


def _compared(published: Published) -> list[Row]:
    """SFT, best of n, the LoRA baselines and the proxy of `compare`."""
    rows = published.rows("compare")
    best = sorted((row for group, row in rows.items() if group.startswith("best_of_n")), key=_n)
    trained = [rows[group] for method in ("dpo", "ppo", "rloo", "grpo") for group in rows if group.startswith(method)]
    return [rows["sft"], *(row._replace(name=f"best of {_n(row)}") for row in best), *trained, _recipe(published)]


def _n(row: Row) -> int:
    return int(re.search(r"\d+", row.records[0]["variant"])[0])


def _recipe(published: Published) -> Row:
    """The proxy of the demo's recipe, with the three seeds that the baselines have."""
    return published.rows("compare")["proxy (prefix)"].with_seeds((0, 1, 2))._replace(name="**proxy**")


def _hour(published: Published) -> Row:
    (row,) = (row for group, row in published.rows("long").items() if group.startswith("proxy"))
    return row


def readme(published: Published) -> str:
    rows = {row.name: row for row in _compared(published)}
    lora = max((rows[name] for name in list(NAMES.values())[1:]), key=lambda row: row.mean("delta_vs_sft"))
    proxies = [
        rows["**proxy**"]._replace(name="**proxy**, ten minutes"),
        _hour(published)._replace(name="**proxy**, an hour"),
    ]
    chosen = [rows["SFT, greedy"]._replace(name="the LM, greedy"), rows["best of 32"], lora, *proxies]
    chosen[2] = chosen[2]._replace(name=f"{lora.name}, the best of four LoRA baselines")
    columns = ["method", "trainable parameters", "gain", "gold gain", "refusals, everyday", "LM forwards per token"]
    return table(chosen, columns)


def comparison(published: Published) -> str:
    rows = _compared(published)
    columns = ["method", "seeds", "machine", "trainable parameters", "reward", "gain", "gold gain", "win rate"]
    columns += ["readers"] * any(map(COLUMNS["readers"], rows))
    columns += ["refusals, everyday", "LM log-prob per token", "LM forwards per token"]
    return table(rows, columns)


def comparison_kinds(published: Published) -> str:
    columns = ["method", "gain, seed by seed", "gain, everyday", "gain, harm-adjacent", "refusals, harm-adjacent"]
    return table(_compared(published), [*columns, "commonest four words"])


def comparison_cost(published: Published) -> str:
    columns = ["method", "machine", "file", "episodes", "training", "seconds per 1,000 episodes"]
    columns += ["peak memory of training", "LM tokens per response", "tokens/s, x SFT"]
    return table(_compared(published), columns)


def episodes(published: Published) -> str:
    """The gate with as few episodes as PPO and DPO have in their ten minutes."""
    few, rows = published.rows("episodes"), {row.name: row for row in _compared(published)}
    chosen = [few["proxy, 448 episodes"], rows["PPO-LoRA"], few["proxy, 1,120 episodes"], rows["DPO-LoRA"]]
    columns = ["method", "seeds", "machine", "episodes", "training", "gain", "seed by seed", "everyday"]
    columns += ["harm-adjacent", "gold gain", "refusals, everyday / harm-adjacent"]
    return table([row._replace(name=row.name.partition(",")[0]) for row in chosen], columns)


def readers(published: Published) -> str:
    """What blind readers preferred: shares of the decided pairs, with their Wilson intervals."""
    cells = []
    for line in published.lines:
        if line["collection"] == "readers":
            first, second = line["first_wins"], line["second_wins"]
            decided = first + second
            share = with_interval(first / decided, rate_ci(first, decided), ".2f") if decided else ""
            cells.append([line["group"], line["kind"], str(first), str(second), str(line["ties"]), share])
    return markdown_table(["first : second", "prompts", "first wins", "second wins", "ties", "first's share"], cells)


def seeds(published: Published) -> str:
    row = published.rows("compare")["proxy (prefix)"]
    rows = [row.seed(record["seed"])._replace(name=str(record["seed"])) for record in row.records]
    columns = [
        "machine",
        "training",
        "reward",
        "gain",
        "gain, everyday",
        "gain, harm-adjacent",
        "win rate",
        "gold gain",
    ]
    columns += ["refusals, everyday / harm-adjacent", "commonest four words", "LM log-prob per token"]
    cells = [[row.name, *(COLUMNS[column](row) for column in columns)] for row in rows]
    return markdown_table(["seed", *columns], cells)


def seeds_spread(published: Published) -> str:
    records = published.rows("compare")["proxy (prefix)"].records
    values = {
        "gain": [record["delta_vs_sft"] for record in records],
        **{
            f"gain, {kind.replace('_', '-')}": [r["by_kind"][kind]["delta_vs_sft"] for r in records]
            for kind in SHOWN_KINDS
        },
        "gold gain": [record["gold_delta_vs_sft"] for record in records],
    }
    mean_row = [f"{np.mean(x):.2f}" for x in values.values()]
    spread = [f"{np.std(x, ddof=1):.2f}" for x in values.values()]
    return markdown_table(
        [f"over {len(records)} seeds", *values], [["mean", *mean_row], ["standard deviation", *spread]]
    )


def long(published: Published) -> str:
    row = _hour(published)._replace(name="proxy")
    rows = [row.seed(record["seed"]) for record in row.records]
    rows.append(row._replace(name="**proxy, three seeds**"))
    rows += [one for one in _compared(published) if one.name in ("best of 16", "best of 32")]
    columns = ["method", "machine", "training", "reward", "gain", "gain, everyday", "gain, harm-adjacent", "win rate"]
    columns += ["gold gain", "refusals, everyday / harm-adjacent", "commonest four words", "LM log-prob per token"]
    return table(rows, [*columns, "LM forwards per token"])


def harmless(published: Published) -> str:
    rows = published.rows("harmless")
    proxy = rows["proxy (prefix)"]._replace(name="**proxy**")
    columns = ["method", "reward", "gain", "gain, everyday", "gain, harm-adjacent", "win rate", "gold gain, everyday"]
    columns += ["gold gain, harm-adjacent", "refusals, everyday / harm-adjacent", "commonest four words"]
    return table([rows["sft"], proxy], [*columns, "LM log-prob per token"])


ABLATED = {
    "recipe": "nothing",
    "group_baseline=False": "group baseline (`group_baseline` false)",
    "pooled_features=False": "pooled features (`pooled_features` false)",
    "lm_logp_coef=0.0": "price on unlikely tokens (`lm_logp_coef` 0)",
    "reward_shaping_tokens=12,gae_lambda=0.95": "intermediate scores (`reward_shaping_tokens` 12, `gae_lambda` 0.95)",
    "replay_rollouts=1": "replay (`replay_rollouts` 1)",
}


def ablation(published: Published) -> str:
    rows = published.rows("ablation")
    columns = ["seeds", "gain", "seed by seed", "everyday", "harm-adjacent", "gold gain"]
    columns += ["refusals, everyday / harm-adjacent", "LM log-prob per token"]
    whole, cells = rows["recipe"], []
    for group, name in ABLATED.items():
        row = rows[group]
        difference = (
            ""
            if group == "recipe"
            else with_interval(
                row.mean("delta_vs_sft") - whole.mean("delta_vs_sft"), row.intervals["difference"], "+.2f"
            )
        )
        found = [COLUMNS[column](row) for column in columns]
        cells.append([name, *found[:3], difference, *found[3:]])
    return markdown_table(["left out", *columns[:3], "difference", *columns[3:]], cells)


def _swept(collection: str, key: str) -> Callable[[Published], str]:
    def print_table(published: Published) -> str:
        columns = ["seeds", "gain", "seed by seed", "everyday", "harm-adjacent", "win rate", "gold gain"]
        columns += ["refusals, everyday / harm-adjacent", "commonest four words", "LM log-prob per token"]
        columns += ["rejected proposals"]
        cells = []
        for group, row in published.rows(collection).items():
            if not group.startswith("proxy"):
                continue
            found = re.search(rf"\b{key}=([\d.]+)", group)
            value = found[1] if found else "1"  # the default has no name
            short = row._replace(intervals={k: v for k, v in row.intervals.items() if k != "win_rate"})
            cells.append([value, *(COLUMNS[column](short) for column in columns)])
        return markdown_table([key, *columns], sorted(cells, key=lambda cell: float(cell[0])), left=0)

    return print_table


BENCHMARKED = {
    "generate, sampled": "`generate`, sampled",
    "generate, greedy": "`generate`, greedy",
    "generate, sampled, contiguous head": "`generate`, sampled, contiguous head",
    "prefix": "prefix features",
    "prefix, as in training": "prefix features, pooled, recorded for training",
    "candidate, one by one": "candidate features, one by one",
    "candidate, tree": "candidate features, tree",
    "best of 4": "best of 4",
    "best of 32": "best of 32",
    "candidate, serial loop": "candidate features, serial loop at batch 1",
}


def benchmark_speed(published: Published) -> str:
    """The cells with the largest and the smallest batch, of the first two runs."""
    runs = published.benchmarks()[:2]
    chosen = [
        (run, next(cell for cell in run["cells"] if cell["batch_size"] == size)) for size in (32, 1) for run in runs
    ]
    rows = []
    for method, name in BENCHMARKED.items():
        found = [cell["methods"].get(method) for _, cell in chosen]
        cells = [
            "" if x is None else f"{x['ratio']:.2f} ({x['ratio_min']:.2f} to {x['ratio_max']:.2f})" for x in found
        ]
        forwards = sorted({f"{x['lm_forwards_per_token']:.2f}" for x in found if x is not None})
        rows.append([name, *cells, forwards[0] if len(forwards) == 1 else f"{forwards[0]} to {forwards[-1]}"])
    headers = [f"batch {size}, run {i + 1}" for size in (32, 1) for i in range(len(runs))]
    return markdown_table(["method", *headers, "LM forwards per token"], rows)


def _fields(table: dict[str, fields.Field]) -> Callable[[Published], str]:
    """A table of what becomes of the fields of TRL's configurations, those with the same fate in one row."""

    def printed(published: Published) -> str:
        rows: dict[fields.Field, list[str]] = {}
        for name, entry in table.items():
            rows.setdefault(entry._replace(same=()), []).append(f"`{name}`")
        cells = []
        for entry, names in sorted(rows.items(), key=lambda row: _STATUSES.index(row[0].status)):
            why = f"only with `{entry.needs}`" if entry.needs else entry.why
            cells.append([", ".join(sorted(names)), entry.status, why])
        return markdown_table(["field", "is", "why"], cells, left=3)

    return printed


# Of transformers' GenerationConfig, as `generation_kwargs` and as an LM's generation_config.json.
_GENERATION = {
    **{name: fields.Field() for name in settings.USED},
    **{name: fields.Field("refused", reason) for name, (_, reason) in settings.REFUSED.items()},
    **{name: fields.Field("refused", "the method decides how a token is chosen") for name in settings.SAMPLING},
    **{name: fields.Field("no effect", "it has no meaning for a causal LM without beams") for name in settings.MOOT},
}
_STATUSES = ("refused", "no effect", "used")

TABLES: dict[str, Callable[[Published], str]] = {
    "readme": readme,
    "comparison": comparison,
    "comparison-kinds": comparison_kinds,
    "comparison-cost": comparison_cost,
    "episodes": episodes,
    "seeds": seeds,
    "seeds-spread": seeds_spread,
    "long": long,
    "harmless": harmless,
    "ablation": ablation,
    "p_t": _swept("sweep_p_t", "p_t"),
    "temperature": _swept("sweep_temperature", "temperature"),
    "benchmark-speed": benchmark_speed,
    "readers": readers,
    "fields-proxy": _fields(fields.PROXY),
    "fields-ppo": _fields(fields.PPO),
    "fields-frozen-lm": _fields(fields.FROZEN_LM),
    "fields-trained-lm": _fields(fields.TRAINED_LM),
    "fields-script": _fields(fields.SCRIPT),
    "fields-generation": _fields(_GENERATION),
}


def fill(page: str, published: Published) -> str:
    """The page with every table between `<!-- table: name -->` and `<!-- end -->` printed anew."""

    def replace(match: re.Match) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"there is no table {match[1]!r}: it must be one of {', '.join(TABLES)}.")
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]](published)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)


def print_tables(pages: list[str]) -> None:
    """Prints every table, or writes those of these pages into them."""
    published = Published(read_lines())
    if not pages:
        for name, print_table in TABLES.items():
            print(f"{name}\n\n{print_table(published)}\n")
    for page in pages:
        path = Path(page)
        write_text(path, fill(path.read_text(encoding="utf-8"), published))
        print(f"{page}: {len(re.findall('<!-- table: ', path.read_text(encoding='utf-8')))} tables")
