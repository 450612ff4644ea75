"""Writes what readers get, a page and a CSV file for each sitting, and the key that they never get."""

import csv
import io
import json
import re
from dataclasses import asdict
from pathlib import Path

from eval.judges.readers.files import KeyInFile, read_checked
from eval.judges.readers.pairs import Duel, Item, Sheet, record_sha256
from eval.report.html import render
from trl_proxy.files import write_text

TEMPLATE = Path(__file__).parent / "page_template" / "reading.html"
GUIDELINES = Path(__file__).parents[1] / "reader_guidelines.md"
CSV_COLUMNS = ("id", "prompt", "response_a", "response_b", "pref", "label_a", "label_b")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run: OWASP, CSV injection


def guidelines() -> tuple[list[tuple[str, list]], dict[str, str]]:
    """The guidelines as the page shows them.

    Returns:
        Blocks, each `p` or `ul` with its paragraphs or entries, which are lists of texts whose odd ones are bold. And
        the labels: letter -> name.
    """
    text = GUIDELINES.read_text(encoding="utf-8").partition("\n## ")[0]
    labels = dict(re.findall(r"^- \*\*(\w), (\w+)\*\*", text, re.MULTILINE))
    blocks: list[tuple[str, list]] = []
    for block in text.split("\n\n")[1:]:
        entries = re.split(r"^- ", block, flags=re.MULTILINE)
        kind, entries = ("ul", entries[1:]) if len(entries) > 1 else ("p", entries)
        blocks.append((kind, [" ".join(entry.split()).split("**") for entry in entries]))
    return blocks, labels


def texts_of(item: Item, records: dict[str, dict]) -> dict[str, str]:
    """The prompt and the responses of an item, by the CSV's columns."""
    first, second = (records[name]["responses"][item.prompt] for name in item.duels[0])
    a, b = (first, second) if item.first_side == "A" else (second, first)
    prompt = records[item.duels[0][0]]["prompts"][item.prompt]
    return {"id": item.id, "prompt": prompt, "response_a": a, "response_b": b}


def sheet_csv(sheet: Sheet, records: dict[str, dict]) -> str:
    """The sheet as CSV, its last three columns empty. With a byte order mark: spreadsheets then read it as UTF-8."""
    buffer = io.StringIO("\ufeff")
    buffer.seek(1)
    rows = csv.DictWriter(buffer, CSV_COLUMNS, restval="", lineterminator="\n")
    rows.writeheader()
    for item in sheet.items:
        texts = texts_of(item, records)
        rows.writerow({k: f"'{text}" if text.startswith(FORMULA) else text for k, text in texts.items()})
    return buffer.getvalue()


def sheet_page(sheet: Sheet, records: dict[str, dict]) -> str:
    """The sheet as one HTML page that needs nothing else; nothing but its own script runs or loads."""
    blocks, labels = guidelines()
    return render(
        TEMPLATE,
        sheet=sheet,
        blocks=blocks,
        labels=labels,
        limit=next(iter(records.values()))["max_new_tokens"],
        data={
            "sheet": sheet.id,
            "file": f"{sheet.name.replace('/', '-')}-verdicts.csv",
            "labels": list(labels),
            "pairs": [texts_of(item, records) for item in sheet.items],
        },
    )


def key_of(duels: list[Duel], sheets: list[Sheet], settings: dict) -> dict:
    """What tells the sides: the settings, the hash of each record, and every sheet."""
    records = {name: record_sha256(record) for duel in duels for name, record in zip(duel.names, duel)}
    return {
        "settings": settings,
        "records": records,
        "duels": [list(duel.names) for duel in duels],
        "sheets": [asdict(sheet) for sheet in sheets],
    }


def read_key(path: Path) -> dict:
    """The key that an export wrote, with its sheets as objects.

    Raises:
        ValueError: if the file is no key.
    """
    key = read_checked(path, KeyInFile, "restore it, or export again")
    sheets = [{**sheet, "items": [Item(**item) for item in sheet["items"]]} for sheet in key["sheets"]]
    return {**key, "sheets": [Sheet(**sheet) for sheet in sheets]}


def write_sheets(folder: Path, key: dict, sheets: list[Sheet], records: dict[str, dict]) -> None:
    """Writes `<folder>/reader<k>/sitting<n>.html` and `.csv`, the guidelines beside them, and `<folder>/key.json`.
    Deletes what is left of an earlier export."""
    for path in folder.glob("reader*/sitting*.*"):
        path.unlink()
    write_text(folder / "key.json", json.dumps(key, indent=1))
    for sheet in sheets:
        path = folder / sheet.name
        write_text(path.parent / "guidelines.md", GUIDELINES.read_text(encoding="utf-8"))
        write_text(path.with_suffix(".html"), sheet_page(sheet, records))
        write_text(path.with_suffix(".csv"), sheet_csv(sheet, records))
