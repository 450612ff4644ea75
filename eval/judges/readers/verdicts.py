"""Reads the files that readers sent back, and refuses what does not fit the sittings, naming file and line."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from eval.judges.readers.pairs import Item, Sheet

LABELS = ("R", "C", "H", "V", "N")
PREFERENCES = ("A", "B", "T")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
COLUMNS = ("id", "pref", "label_a", "label_b")


class Reading(NamedTuple):
    """What one reader said of one pair: which record's response is better, and what each is.

    Attributes:
        winner: `first`, `second` or `tie`.
        labels: of the first and of the second record's response.
    """

    reader: int
    item: Item
    winner: str
    labels: tuple[str, str]


def verdict_files(places: Iterable[str | Path]) -> list[Path]:
    """The CSV and JSON files among these files and folders.

    Raises:
        ValueError: if a place is neither, or a file of another kind, or a folder has a spreadsheet.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            if sheet := next((path for path in place.iterdir() if path.suffix.lower() in SPREADSHEETS), None):
                raise ValueError(f"{sheet} is a spreadsheet: save it as CSV.")
            found += sorted(path for path in place.iterdir() if path.suffix.lower() in (".csv", ".json"))
        elif place.is_file() and place.suffix.lower() in (".csv", ".json"):
            found.append(place)
        else:
            raise ValueError(f"--verdicts must name folders, or files .csv or .json that exist, got {str(place)!r}.")
    return found


def _decoded(path: Path) -> str:
    """The file's text; a spreadsheet may have saved it in a code page, which changes no letter that matters."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    """(line, row) of a CSV file, with commas, semicolons or tabs between cells."""
    header = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=header.count))
    names = [name.strip().lower() for name in next(rows, [])]
    if missing := [name for name in COLUMNS if name not in names]:
        raise ValueError(f"{path}, line 1: there is no column {', '.join(missing)}: the columns are {COLUMNS}.")
    line = rows.line_num + 1
    try:
        for cells in rows:
            yield line, dict(zip(names, cells))
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: this is no CSV ({error}).") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    """(line, row) of a JSON file: a list of verdicts, or an object whose `verdicts` they are."""
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {getattr(error, 'lineno', 1)}: this is no JSON ({error}).") from None
    rows = rows.get("verdicts") if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}, line 1: this is no list of verdicts with {', '.join(COLUMNS)}.")
    place = 0
    for row in rows:
        place = max(place, text.find(f'"{row.get("id")}"', place))
        yield text.count("\n", 0, place) + 1, row


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, cells) of the rows of a file that hold a verdict; a row that is not filled in yet is left out."""
    read = _json_rows if path.suffix.lower() == ".json" else _csv_rows
    for line, row in read(path, _decoded(path)):
        cells = {name: str(row.get(name) or "").strip() for name in COLUMNS}
        if any(cells[name] for name in COLUMNS[1:]):
            yield f"{path}, line {line}", cells


def is_filled(path: Path) -> bool:
    """Whether a file has a row with a verdict, or part of one."""
    return any(True for _ in _rows(path))


def _reading(where: str, cells: dict[str, str], sheet: Sheet, item: Item) -> Reading:
    """The reading of a filled row."""
    for name, allowed in zip(COLUMNS[1:], (PREFERENCES, LABELS, LABELS)):
        if (letter := cells[name].upper()) not in allowed:
            got = f"got {letter!r}" if letter else "and is empty"
            raise ValueError(f"{where}: {name} of {item.id} must be one of {', '.join(allowed)}, {got}.")
    first, second = ("label_a", "label_b") if item.first_side == "A" else ("label_b", "label_a")
    pref = cells["pref"].upper()
    winner = "tie" if pref == "T" else "first" if pref == item.first_side else "second"
    return Reading(sheet.reader, item, winner, (cells[first].upper(), cells[second].upper()))


def read_verdicts(files: list[Path], sheets: list[Sheet]) -> list[Reading]:
    """All readings of these files.

    Raises:
        ValueError: a file is damaged, a row is of no sheet, of another sheet than the rest of its file, not whole, or
            there twice.
    """
    known = {item.id: (sheet, item) for sheet in sheets for item in sheet.items}
    readings: dict[str, tuple[Reading, str]] = {}
    for path in files:
        before: tuple[Sheet, str] | None = None
        for where, cells in _rows(path):
            name = cells["id"]
            if name not in known:
                raise ValueError(f"{where}: {name!r} is no pair of these sittings: it may be of another export.")
            sheet, item = known[name]
            if before is not None and before[0] is not sheet:
                raise ValueError(f"{where}: {name} is of {sheet.name}, but {before[1]} is of {before[0].name}.")
            if name in readings:
                raise ValueError(f"{where}: {name} has a verdict in {readings[name][1]} already: keep one of them.")
            before = sheet, where
            readings[name] = _reading(where, cells, sheet, item), where
    return [reading for reading, _ in readings.values()]
