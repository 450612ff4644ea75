"""The comparison as one HTML page that needs nothing else: no network, no other file, no server.

Everything that a model or a person wrote reaches the page as text: jinja2 escapes the tables, the responses are JSON
whose `<`, `>` and `&` are escaped, and the script puts them on the page as text nodes only. A content security policy
with the hashes of the page's own style and script lets nothing else run or load.
"""

import base64
import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval.comparison import Comparison, kind_title, label, mean_over_seeds
from eval.judges.judgements import judgement_table
from eval.judges.readers.results import READER_COLUMNS, duel_table, label_table
from eval.refusals import is_refusal
from eval.report.html import render
from eval.report.tables import notes, tables
from eval.stats import paired_delta
from trl_proxy.loading import EMBEDDED

TEMPLATE = Path(__file__).parent / "page_template" / "page.html"
REWARD_NOTE = "a 22M encoder, see trl_proxy/data/reward/README.md"
# The settings that matter most, of two hundred in run.json; the page folds the others away.
HYPERPARAMETERS = [
    "p_t",
    "p_t_mode",
    "max_candidates",
    "temperature",
    "proposal",
    "features",
    "feature_layers",
    "pooled_features",
    "gate_hidden_sizes",
    "threshold",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
    "replay_rollouts",
    "max_completion_length",
    "gamma",
    "gae_lambda",
    "epsilon",
    "cliprange_value",
    "vf_coef",
    "entropy_coef",
    "beta",
    "lm_logp_coef",
    "reward_shaping_tokens",
    "max_grad_norm",
    "weight_decay",
    "lora_r",
    "lora_alpha",
    "dtype",
    "seed",
]
COLUMNS = {
    "method": "How the response was made; in brackets what differs between variants. sft is the LM itself, greedy.",
    "seeds": "Training seeds whose records are averaged.",
    "reward": "Mean reward of the responses, larger is better.",
    "Δ vs SFT": "Mean gain in reward over SFT on the same prompts, with its 95 % interval.",
    "win rate": "Share of prompts with a larger reward than SFT's, a tie as half, with its 95 % interval.",
    "readers": "Share of the pairs that blind readers decided for the method and not for SFT, with its 95 % interval.",
    "gold Δ": "The gain by a reward that no method trains on.",
    "trainable": "Parameters that training changes, and their share of all.",
    "LM log-prob": "Log-probability of a response token under the frozen LM, in nats: 0 would be certain.",
    "LM forwards": "Forward passes of the LM per response token.",
    "speed": "Tokens per second over SFT's in the same run.",
}
CAPTIONS = {
    "reward_distributions": "How the rewards of each method spread over the prompts.",
    "gains": "Gain in reward over SFT on the same prompts, for all of them and for each kind.",
    "win_rates": "How often each method's reward is above SFT's, equal to it, or below.",
    "cost_against_gain": "Gain over SFT against what it costs when answering and in training; up and left is better.",
    "reward_against_logprob": "Reward against how likely the responses are under the LM; best-of-n is joined by n.",
    "reward_against_threshold": "Reward of a proxy when its threshold is moved at inference, without training.",
    "training_curve": "Reward while training; for several methods, by each reward function that all of them log.",
    "over_optimisation": "Training reward and a reward that is not trained on, while training.",
}
SWEEP_CAPTIONS = {
    "scores": "Mean reward on the test prompts by {key}; circles are seeds.",
    "curves": "Reward while training, by {key}.",
    "distributions": "How the rewards of the test prompts spread, by {key}.",
}


def _caption(figure: str) -> str:
    """The caption of a figure by its file name; figures of a sweep are `sweep_<key>_<what>`."""
    key, _, what = figure.removeprefix("sweep_").rpartition("_")
    if figure.startswith("sweep_") and what in SWEEP_CAPTIONS:
        return SWEEP_CAPTIONS[what].format(key=key)
    return CAPTIONS.get(figure, figure.replace("_", " "))


def _mean(key: str, unit: float = 1.0) -> Callable[[list[dict]], float | None]:
    """A function of a method's records: the mean of `key` over seeds in `unit`, None if a record has none."""

    def of(group: list[dict]) -> float | None:
        value = mean_over_seeds(group, key)
        return None if value is None else value / unit

    return of


def _seconds_per_1000_episodes(group: list[dict]) -> float | None:
    seconds, episodes = mean_over_seeds(group, "train_seconds"), mean_over_seeds(group, "episodes")
    return 1000 * seconds / episodes if seconds is not None and episodes else None


PARAMETER_COLUMNS = {
    "trainable": (_mean("trainable_parameters"), ",.0f", "Parameters that training changes."),
    "total": (_mean("total_parameters"), ",.0f", "Parameters of the LM and what is added to it."),
    "file, MB": (_mean("adapter_bytes", 1e6), ".1f", "Size of the file that training saves."),
    "episodes": (_mean("episodes"), ",.0f", "Responses that were sampled and scored in training; for DPO, pairs."),
    "training, s": (_mean("train_seconds"), ",.0f", "Seconds of training."),
    "s / 1,000 episodes": (_seconds_per_1000_episodes, ",.0f", "Seconds of training that 1,000 episodes take."),
    "peak memory, MB": (
        _mean("train_peak_memory_mb"),
        ",.0f",
        "Largest memory of training, all processes together.",
    ),
    "tokens": (_mean("response_tokens_mean"), ".1f", "Mean length of a response in tokens."),
    "reward calls": (_mean("reward_calls_per_response"), ".0f", "Responses that the reward scored for one answer."),
    "rejected": (_mean("reject_rate"), ".0%", "Share of the gate's decisions that reject a proposal."),
    "accepted rank": (
        _mean("accepted_rank_mean"),
        ".2f",
        "Mean rank of the accepted proposal; 0 is the LM's first choice.",
    ),
    "KL to LM": (
        _mean("kl_to_lm"),
        ".2f",
        "Divergence of the method's next-token distribution from the LM's, nats per token.",
    ),
}
JUDGE_COLUMNS = {
    "judge": "Who decided which of two responses to a prompt is better: the method's or SFT's.",
    "orders disagree": "Share of pairs whose verdict changed when the responses changed places; they count as ties.",
    "unparsed": "Answers of the judge that were no verdict.",
    "tokens": "What the judge read and wrote.",
    "cost": "Cost of those tokens, in the currency of the given prices.",
}


def explain(header: str) -> str:
    """What a column of the summary tables says, in one line."""
    for prefix, text in (
        ("Δ ", "Mean gain in reward over SFT on {} prompts."),
        ("refusals ", "Share of {} prompts that were refused, by a list of phrases."),
        ("true refusals ", "Share of the responses to {} prompts that blind readers labelled a fitting refusal."),
        ("nonsense ", "Share of the responses to {} prompts that blind readers labelled nonsense or off topic."),
    ):
        if header.startswith(prefix) and header not in COLUMNS:
            return text.format(header.removeprefix(prefix))
    return COLUMNS[header]


def parameter_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers and text cells, a row per method: sizes, training, and what decoding did; means over seeds."""
    rows = []
    for name, group in comparison.groups.items():
        values = ((value_of(group), form) for value_of, form, _ in PARAMETER_COLUMNS.values())
        rows.append([name, *("n/a" if value is None else format(value, form) for value, form in values)])
    return ["method", *PARAMETER_COLUMNS], rows


def _cell(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def settings_table(columns: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Headers and text cells, a row per setting and a column per method or run; empty if it has none.

    Args:
        columns: name of the column -> its settings.
    """
    keys = dict.fromkeys(key for settings in columns.values() for key in settings)
    rows = [[key, *(_cell(s[key]) if s.get(key) is not None else "" for s in columns.values())] for key in keys]
    return ["setting", *columns], [row for row in rows if any(row[1:])]


def difference(response: str, reference: str) -> list[str]:
    """The response in alternating parts: shared with the reference, then not shared.

    Only words are compared; white space stays outside of the parts that differ. Joined, the parts are the response;
    the first may be empty.
    """
    pieces = re.findall(r"(\s*)(\S+)", response)
    words = [word for _, word in pieces]
    same = [False] * len(words)
    # No autojunk: it treats frequent words of long texts as noise.
    for start, _, size in difflib.SequenceMatcher(
        None, words, reference.split(), autojunk=False
    ).get_matching_blocks():
        same[start : start + size] = [True] * size
    parts = [""]
    for (space, word), kept in zip(pieces, same, strict=True):
        differs = len(parts) % 2 == 0
        if kept and differs:
            parts.append(space + word)
        elif not kept and not differs:
            parts[-1] += space
            parts.append(word)
        else:
            parts[-1] += space + word
    parts[-1] += response[sum(len(space) + len(word) for space, word in pieces) :]
    return parts


def browser_data(comparison: Comparison) -> dict:
    """What the browser of responses shows, ready for JSON: prompts, kinds, and a column per method and seed.

    The first seed of each method is `shown` until the reader asks for others.
    """
    groups, sft = comparison.groups, comparison.sft
    first = next(iter(groups.values()))[0]
    several = any(len(group) > 1 for group in groups.values())
    columns = []
    for name, group in groups.items():
        for record in group:
            gains = None if sft is None else paired_delta(record["rewards"], sft["rewards"])
            others = record["responses"] if sft is None else sft["responses"]
            columns.append(
                {
                    "name": f"{name}, seed {record['seed']}" if several else name,
                    "shown": record is group[0],
                    "sft": record["method"] == "sft",
                    "rewards": np.round(record["rewards"], 4).tolist(),
                    "gains": None if gains is None or record["method"] == "sft" else np.round(gains, 4).tolist(),
                    "gold": None if record["gold_rewards"] is None else np.round(record["gold_rewards"], 4).tolist(),
                    "refused": list(map(is_refusal, record["responses"])),
                    "trace": record["trace"],
                    "responses": [difference(a, b) for a, b in zip(record["responses"], others, strict=True)],
                }
            )
    kinds = None if first["kinds"] is None else list(map(kind_title, first["kinds"]))
    return {"prompts": first["prompts"], "kinds": kinds, "columns": columns}


def _full_name(name: str | None, embedded: str) -> str:
    """The name, and the project's default behind `embedded`, which tells a reader nothing."""
    if name is None:
        return "none"
    return f"{name} ({embedded})" if name.split(":")[0] == EMBEDDED else name


def render_page(
    comparison: Comparison,
    figures: list[Path],
    runs: dict[str, dict] | None = None,
    judgements: list[dict] | None = None,
    readers: dict | None = None,
) -> str:
    """The page.

    Args:
        comparison: what is shown.
        figures: PNG files, in their order on the page.
        runs: name of a training -> its settings, from run.json and proxy_config.json.
        judgements: of these records, as [`eval.judges.judgements.read_judgements`] gives them.
        readers: of these records, as [`eval.judges.readers.results.read_results`] gives it.

    Returns:
        HTML, complete in itself.
    """
    groups, records, runs = comparison.groups, comparison.records, runs or {}
    record = next(iter(groups.values()))[0]
    evaluation = {f"{label(r)}, seed {r['seed']}": r["settings"] for group in groups.values() for r in group}
    chosen = {
        name: {key: settings[key] for key in HYPERPARAMETERS if key in settings} for name, settings in runs.items()
    }
    return render(
        TEMPLATE,
        images=True,
        record=record,
        model=_full_name(record["model"], "SmolLM2-135M-Instruct"),
        reward=_full_name(record["reward_model"], REWARD_NOTE),
        gold_reward=_full_name(record["gold_reward_model"], REWARD_NOTE),
        methods=list(groups),
        summary=[(headers, rows, [(h, explain(h)) for h in headers]) for headers, rows in tables(comparison)],
        notes=notes(comparison),
        judgements=judgement_table(judgements) if judgements else None,
        judge_columns=list(JUDGE_COLUMNS.items()),
        readers=[duel_table(readers), label_table(readers)] if readers else None,
        reader_columns=list(READER_COLUMNS.items()),
        parameters=(
            *parameter_table(comparison),
            [(name, text) for name, (_, _, text) in PARAMETER_COLUMNS.items()],
        ),
        hyperparameters=settings_table(chosen),
        all_settings=settings_table(runs),
        evaluation=settings_table(evaluation),
        figures=[(_caption(path.stem), base64.b64encode(path.read_bytes()).decode("ascii")) for path in figures],
        provenance=[
            (title, sorted({str(r[key] or "unknown") for r in records}))
            for title, key in (("command", "command"), ("git commit", "git_commit"), ("started at", "started_at"))
        ],
        versions=sorted({", ".join(f"{name} {version}" for name, version in r["versions"].items()) for r in records}),
        has_trace=any(r["trace"] for r in records),
        has_sft=comparison.sft is not None,
        data=browser_data(comparison),
    )
