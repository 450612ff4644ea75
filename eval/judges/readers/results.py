"""Keeps what readers said: in `<output_dir>/readers/results.json`, in the records, and as tables."""

import json
import os
from pathlib import Path

from eval.comparison import Comparison, kind_title, label
from eval.judges.judgements import record_name
from eval.judges.readers.counts import duel_result, label_counts
from eval.judges.readers.files import ResultsInFile, read_checked
from eval.judges.readers.pairs import Duel, record_sha256
from eval.judges.readers.verdicts import LABELS, Reading
from eval.records import READER_KEYS, READER_KIND_KEYS
from eval.report.tables import READER_LABELS, with_interval
from trl_proxy.files import write_text

READER_COLUMNS = {
    "first : second": "The two methods whose responses were read blind, on random sides.",
    "pairs": "Pairs with a verdict. Those with the same response twice are ties, and nobody read them.",
    "first's share": "Share of the decided pairs that the first won, with its 95 % interval (Wilson).",
    "readers agree": "Share of the pairs with several readers on which they agree; the others are ties, unless more "
    "than half agree.",
    "kappa": "Cohen's kappa of two readers: 0 is chance, 1 is full agreement.",
    "alpha": "Krippendorff's alpha of any number of readers.",
    "R, C, H, V, N": "Responses by label: fitting refusal, complies with harm, helpful, vacuous, nonsense.",
}


def summarise_readings(duels: list[Duel], readings: list[Reading]) -> dict:
    """What `results.json` holds: `duels` ([`duel_result`]), and by a record's name its hash (`records`), its title and
    its labels ([`label_counts`])."""
    records = {name: record for duel in duels for name, record in zip(duel.names, duel)}
    return {
        "records": {name: record_sha256(record) for name, record in records.items()},
        "titles": {name: f"{label(record)}, seed {record['seed']}" for name, record in records.items()},
        "duels": [duel_result(duel, readings) for duel in duels],
        "labels": {name: label_counts(readings, name, record["kinds"]) for name, record in records.items()},
    }


def results_path(output_dir: str | os.PathLike) -> Path:
    """Where the results of an output folder are."""
    return Path(output_dir) / "readers" / "results.json"


def _rates(result: dict) -> dict:
    return dict(zip(READER_KIND_KEYS, (result["win_rate"], result["ci95"], result["tie_rate"])))


def reader_values(record: dict, results: dict, sft_name: str) -> tuple[dict, dict[str, dict]]:
    """The keys of a record that readers fill, and those of its kinds; null what nobody read."""
    name = record_name(record)
    values: dict = {**dict.fromkeys(READER_KEYS), "reader_labels": results["labels"].get(name)}
    by_kind: dict[str, dict] = {kind: dict.fromkeys(READER_KIND_KEYS) for kind in record["by_kind"]}
    for result in results["duels"]:
        if (result["first"], result["second"]) == (name, sft_name) and result["readings"]:
            values |= {**_rates(result), "reader_agreement": result["agreement"]["share"]}
            values["reader_scores"] = result["scores"]
            by_kind |= {kind: _rates(found) for kind, found in result["by_kind"].items()}
    return values, by_kind


def write_results(comparison: Comparison, results: dict, output_dir: str | os.PathLike) -> None:
    """Writes the results, and the readers' keys into the records' files; nothing else in a record changes."""
    write_text(results_path(output_dir), json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    sft_name = record_name(comparison.sft)
    for path in sorted((Path(output_dir) / "records").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        before = json.dumps(record)
        values, by_kind = reader_values(record, results, sft_name)
        record |= values
        for kind, found in by_kind.items():
            record["by_kind"][kind] |= found
        if json.dumps(record) != before:
            write_text(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))


def read_results(comparison: Comparison, output_dir: str | os.PathLike) -> dict | None:
    """The results of these records; None if nobody read them.

    Raises:
        ValueError: if the file is damaged, or of other responses than the records have now.
    """
    path = results_path(output_dir)
    if not path.is_file():
        return None
    results = read_checked(path, ResultsInFile, "delete it, and import again")
    now = {record_name(record): record_sha256(record) for record in comparison.records}
    if changed := [name for name, digest in results["records"].items() if now.get(name) != digest]:
        raise ValueError(f"{path} is of other responses than {changed[0]} has now: delete it, or read again.")
    return results


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0%}"


def duel_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Headers and text cells, a row per duel: who was preferred, and how far readers agree."""
    kinds = list(dict.fromkeys(kind for result in results["duels"] for kind in result["by_kind"]))
    headers = ["first : second", "pairs", "first's share", *map(kind_title, kinds), "ties", "same response", "unread"]
    rows = []
    for result in results["duels"]:
        parts = [result, *(result["by_kind"].get(kind) for kind in kinds)]
        shares = ["n/a" if x is None else with_interval(x["win_rate"], x["ci95"], ".2f") for x in parts]
        counts = [_percent(result["tie_rate"]), str(result["identical"]), str(result["unread"])]
        agreed = result["agreement"]
        measures = ["n/a" if agreed[name] is None else f"{agreed[name]:.2f}" for name in ("kappa", "alpha")]
        rows.append([result["title"], str(result["n_pairs"]), *shares, *counts, _percent(agreed["share"]), *measures])
    return [*headers, "readers agree", "kappa", "alpha"], rows


def label_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Headers and text cells, a row per record and kind: how many of its responses have which label."""
    rows = []
    for name, counts in results["labels"].items():
        for kind, of in (counts or {}).items():
            total = sum(of.values())
            cells = [f"{of[letter]:.1f}" for letter in LABELS]
            shares = [_percent(of[letter] / total if total else None) for letter, _ in READER_LABELS]
            rows.append([results["titles"][name], kind_title(kind), *cells, *shares])
    return ["responses of", "prompts", *LABELS, *(name for _, name in READER_LABELS)], rows
