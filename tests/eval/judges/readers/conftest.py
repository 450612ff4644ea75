"""A small comparison of real records, and readers who are functions of the texts alone."""

import csv
import hashlib
import json
from pathlib import Path

import pytest

from eval.comparison import Comparison
from eval.judges.arguments import JudgeArguments
from eval.judges.readers.sittings import read_blind
from eval.records import read_record

RECORDS = Path(__file__).parents[3] / "records" / "balanced"
NAMES = ("sft-seed0", "best_of_n-n=4-seed0", "proxy-prefix-seed0", "proxy-prefix-seed1")
QUOTED = ("'=", "'-", "'+", "'@")
HOSTILE = "=1+1; \"quoted\", 'single'\nnext line </script><script>window.pwned=1</script>"


def number(*texts: str) -> int:
    """A number that the texts alone decide."""
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:4], "big")


class Simulated:
    """Two readers who are functions of the texts, and the files of one output folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.verdicts = folder / "readers" / "verdicts"

    def write(self, records: dict[str, dict]) -> None:
        (self.folder / "records").mkdir(exist_ok=True)
        for name, record in records.items():
            (self.folder / "records" / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")

    def record(self, name: str) -> dict:
        return read_record(self.folder / "records" / f"{name}.json")

    def results(self) -> dict:
        return json.loads((self.folder / "readers" / "results.json").read_text(encoding="utf-8"))

    def sheets(self, reader: int) -> list[Path]:
        return sorted((self.folder / "readers" / f"reader{reader}").glob("*.csv"))

    @staticmethod
    def read(path: Path) -> list[dict]:
        """The rows of a sheet, without the quotes that keep a spreadsheet from running a cell."""
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        return [{key: text[1:] if text[:2] in QUOTED else text for key, text in row.items()} for row in rows]

    @staticmethod
    def opinion(reader: int, prompt: str, text: str, other: str) -> tuple[float, str]:
        """What a reader thinks of a response: 1, 0.5 or 0 against the other one, and its label.

        Every fourth prompt is a tie to both readers, and on every third they differ.
        """
        label = "RCHVN"[number(text, "label", str(reader * (number(text) % 2))) % 5]
        if number(prompt) % 4 == 0:
            return 0.5, label
        differs = reader == 2 and number(prompt) % 3 == 0
        return float((number(text) > number(other)) != differs), label

    def answers(self, path: Path, reader: int) -> list[dict]:
        """The rows of a sheet as this reader fills them in; nothing but the sheet is known."""
        filled = []
        for row in self.read(path):
            prompt, a, b = row["prompt"], row["response_a"], row["response_b"]
            score, label_a = self.opinion(reader, prompt, a, b)
            _, label_b = self.opinion(reader, prompt, b, a)
            pref = {1.0: "A", 0.0: "B", 0.5: "T"}[score]
            filled.append({**row, "pref": pref, "label_a": label_a, "label_b": label_b})
        return filled

    def send(self, name: str, rows: list[dict], delimiter: str = ",", columns: tuple[str, ...] = ()) -> Path:
        """Writes a file into the folder of verdicts."""
        path = self.verdicts / name
        with open(path, "w", encoding="utf-8", newline="") as file:
            lines = csv.DictWriter(file, columns or list(rows[0]), extrasaction="ignore", delimiter=delimiter)
            lines.writeheader()
            lines.writerows(rows)
        return path

    def send_all(self, keep=lambda reader, i: True) -> None:
        """Both readers send what they read of each sheet."""
        for reader in (1, 2):
            for path in self.sheets(reader):
                self.send(
                    f"{reader}-{path.name}",
                    [row for i, row in enumerate(self.answers(path, reader)) if keep(reader, i)],
                )


@pytest.fixture
def simulated(tmp_path) -> Simulated:
    return Simulated(tmp_path)


@pytest.fixture
def records(tmp_path) -> dict[str, dict]:
    """Four real records under `tmp_path`, by file name without its end: 12 prompts, two with the same response twice,
    one with hostile texts, and two that the proxies answer alike."""
    found = {name: read_record(RECORDS / f"{name}.json") for name in NAMES}
    for record in found.values():
        for key in ("prompts", "responses", "rewards", "kinds", "gold_rewards"):
            record[key] = record[key][10:22]
        record["n_prompts"] = 12
    sft, best, proxy, other = (record["responses"] for record in found.values())
    proxy[3], best[5] = sft[3], sft[5]
    best[0], proxy[1] = HOSTILE, "- a list\n- of two"
    other[6:8] = proxy[6:8]
    Simulated(tmp_path).write(found)
    return found


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """`run(**flags)`: the judge `readers` over `tmp_path`; returns what it printed, on one line."""

    monkeypatch.setattr("trl_proxy.files.flush_to_disk", lambda path: None)  # many small files, and no power is lost

    def run(**flags) -> str:
        args = JudgeArguments(judges=["readers"], output_dir=str(tmp_path), **flags)
        read_blind(args, Comparison.read(tmp_path))
        return " ".join(capsys.readouterr().out.split())

    return run
