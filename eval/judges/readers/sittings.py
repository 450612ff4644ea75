"""The judge `readers` of scripts/judge.py: writes the sittings, and counts the verdicts once they are there."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from eval.comparison import Comparison
from eval.judges.arguments import JudgeArguments
from eval.judges.judgements import record_name
from eval.judges.readers.export import key_of, read_key, write_sheets
from eval.judges.readers.pairs import Duel, Sheet, differing, find_duels, make_sheets, record_sha256
from eval.judges.readers.results import duel_table, label_table, summarise_readings, write_results
from eval.judges.readers.verdicts import Reading, is_filled, read_verdicts, verdict_files
from eval.report.tables import print_table
from trl_proxy.runs.resume import changed_keys


def read_blind(args: JudgeArguments, comparison: Comparison) -> None:
    """Imports the verdicts if there are any; else writes the pages and CSV files.

    Raises:
        ValueError: if the settings or the records are no longer those of the export, or a verdict does not fit.
    """
    folder = Path(args.output_dir, "readers")
    (folder / "verdicts").mkdir(parents=True, exist_ok=True)
    files = verdict_files(args.verdicts or [folder / "verdicts"])
    settings = {name: getattr(args, name) for name in ("readers", "reader_pairs", "sitting_pairs", "reader_seed")}
    path = folder / "key.json"
    if args.overwrite and files:
        raise ValueError(f"--overwrite would lose the key of {files[0]}: move the verdicts out of the way first.")
    if files and not path.is_file():
        raise ValueError(f"{files[0]} has verdicts, but {path}, which tells the sides, is not there: restore it.")
    if path.is_file() and not args.overwrite:
        key = read_key(path)
        check_unchanged(key, settings, comparison, path)
        if files:
            import_verdicts(args, comparison, key, files)
            return
    for sheet in sorted(folder.glob("reader*/sitting*.csv")):
        if is_filled(sheet):  # an export would empty it
            raise ValueError(f"{sheet} has verdicts: move it to {folder / 'verdicts'} to have them counted.")
    export(folder, comparison, settings)


def check_unchanged(key: dict, settings: dict, comparison: Comparison, path: Path) -> None:
    """Raises `ValueError` if the sittings have other settings, or are of responses that are no longer there."""
    redo = "choose another --output_dir, or export and read again with --overwrite."
    if changed := changed_keys(key["settings"], settings):
        raise ValueError(f"{path} was written with other settings (different: {', '.join(changed)}): {redo}")
    now = {record_name(record): record_sha256(record) for record in comparison.records}
    for name, digest in key["records"].items():
        if now.get(name) != digest:
            what = "has other responses than" if name in now else "is not there, but was"
            raise ValueError(f"records/{name} {what} when its pairs were exported to {path.parent}: {redo}")


def export(folder: Path, comparison: Comparison, settings: dict) -> None:
    """Writes the sheets, and says what is in them and what to do with them."""
    duels = find_duels(comparison, settings["reader_pairs"])
    readers, most = settings["readers"], settings["sitting_pairs"]
    sheets = make_sheets(duels, readers=readers, most=most, seed=settings["reader_seed"])
    if not sheets:
        raise ValueError("--judges readers found no pair to read: all responses are the same.")
    for duel in duels:
        same = duel.first["n_prompts"] - len(differing(duel))
        print(f"{duel.title}: {duel.first['n_prompts']} prompts, {same} with the same response twice, ties unread.")
    records = {name: record for duel in duels for name, record in zip(duel.names, duel)}
    write_sheets(folder, key_of(duels, sheets, settings), sheets, records)
    pairs = sum(len(sheet.items) for sheet in sheets if sheet.reader == 1)
    largest = max(len(sheet.items) for sheet in sheets)
    print(f"Pairs to read: {pairs}; sittings: {sheets[0].sittings}, of at most {largest}; readers: {readers}.")
    print(
        f"Give reader k the folder {folder / 'reader<k>'}, and keep {folder / 'key.json'}, which tells the sides. Put "
        f"what comes back into {folder / 'verdicts'}, and run the same command again."
    )


def duels_of(key: dict, comparison: Comparison) -> list[Duel]:
    """The duels of a key."""
    by_name = {record_name(record): record for record in comparison.records}
    return [Duel(by_name[first], by_name[second]) for first, second in key["duels"]]


def import_verdicts(args: JudgeArguments, comparison: Comparison, key: dict, files: list[Path]) -> None:
    """Counts the verdicts, writes results and records, and prints both tables."""
    readings = read_verdicts(files, key["sheets"])
    if not readings:
        raise ValueError(f"{files[0]} holds no verdict yet: fill in pref, label_a and label_b.")
    print_missing(key["sheets"], readings)
    results = summarise_readings(duels_of(key, comparison), readings)
    write_results(comparison, results, args.output_dir)
    for name in sorted({record_name(r) for r in comparison.records if r["method"] != "sft"} - key["records"].keys()):
        print(f"records/{name} is in none of these sittings.")
    if any(result["agreement"]["pairs"] for result in results["duels"]) and not find_spec("nltk"):
        print('Krippendorff\'s alpha needs nltk and is left out: run `pip install -e ".[readers]"`.')
    for headers, rows in (duel_table(results), label_table(results)):
        print_table(headers, rows, left=2 if headers[1] == "prompts" else 1, width=160)


def print_missing(sheets: list[Sheet], readings: list[Reading]) -> None:
    """Says of every sheet that is not read to its end how many verdicts are missing."""
    read = {reading.item.id for reading in readings}
    unread = Counter({sheet.name: sum(item.id not in read for item in sheet.items) for sheet in sheets})
    for sheet in sheets:
        if missing := unread[sheet.name]:
            print(f"{sheet.name}: {missing} of {len(sheet.items)} verdicts are missing.")
    print(f"{len(readings)} verdicts count, {unread.total()} are missing.")
