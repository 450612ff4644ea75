"""Tests of the published results: the documentation shows what its records say, and nothing else."""

import json
from pathlib import Path

import pytest

from eval.comparison import Comparison
from eval.published import SHOWN_KINDS, Published, read_lines, write_summaries
from eval.published_tables import TABLES, fill, print_tables

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/results.md", "docs/fields.md")


@pytest.fixture(scope="module")
def published():
    return Published(read_lines())


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_the_documentation_are_those_of_the_records(page, published):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert fill(text, published) == text, "run `make tables`"


def test_every_table_is_shown_somewhere():
    shown = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert all(f"<!-- table: {name} -->" in shown for name in TABLES)


def test_every_table_of_the_results_comes_from_the_records():
    """Outside of the markers there is none."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for part in text.split("<!-- table: "):
        assert "| ---" not in part.partition("<!-- end -->")[2]


def test_a_number_that_is_changed_is_noticed(published):
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert fill(text.replace("+0.62 [+0.55, +0.70]", "+0.72 [+0.55, +0.70]"), published) == text


def test_an_unknown_table_is_named(published):
    with pytest.raises(ValueError, match="there is no table 'nonsense'"):
        fill("<!-- table: nonsense -->\n<!-- end -->", published)


def test_a_page_is_filled(published, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- table: harmless -->\n<!-- end -->\n\nAfter.\n")
    print_tables([str(page)])
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- table: harmless -->\n\n| method | reward |")
    assert text.endswith("|\n\n<!-- end -->\n\nAfter.\n")
    print_tables([])
    assert TABLES["harmless"](published) in capsys.readouterr().out


@pytest.fixture
def records(make_record):
    sft = make_record("sft", [0.0, 1.0, 2.0, 3.0], gold_rewards=[0.0, 1.0, 0.0, 1.0])
    gold = [[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, 3.0]]
    rewards = [[1.0, 2.0, 2.0, 2.0], [2.0, 3.0, 4.0, 4.0]]
    gained = [0.5, 1.0]  # by the gold reward
    return [
        sft,
        *(
            make_record("proxy", rewards[k], sft, seed=k, gold_rewards=gold[k], gold_delta_vs_sft=gained[k])
            for k in (0, 1)
        ),
    ]


def test_what_is_written_is_what_the_comparison_says(records, tmp_path):
    """Means and intervals of a row are those of the comparison, of several seeds too."""
    comparison = Comparison(records)
    write_summaries(comparison, "mine", "A", tmp_path / "lines.jsonl")
    rows = Published(read_lines(tmp_path / "lines.jsonl")).rows("mine")
    row, group = rows["proxy"], comparison.groups["proxy"]
    assert (row.mean("delta_vs_sft"), row.intervals["gain"]) == comparison.gain(group)
    assert (row.mean("gold_delta_vs_sft"), row.intervals["gold_gain"]) == comparison.gain(group, gold=True)
    for kind in SHOWN_KINDS:
        found = (row.mean("by_kind", kind, "delta_vs_sft"), row.intervals[f"gain_{kind}"])
        assert found == comparison.gain(group, kind)
    assert (row.mean("win_rate_vs_sft"), row.intervals["win_rate"]) == comparison.win_rate(group)
    one = row.seed(1)
    assert (one.mean("delta_vs_sft"), one.intervals["gain"]) == comparison.gain([group[1]])
    assert rows["sft"].mean("delta_vs_sft") is None


def test_other_collections_stay(records, tmp_path):
    path = tmp_path / "lines.jsonl"
    write_summaries(Comparison(records), "first", "A", path)
    before = path.read_text()
    write_summaries(Comparison(records[:2]), "second", "B", path)
    assert path.read_text().startswith(before)
    write_summaries(Comparison(records[:1]), "second", "B", path)
    assert [json.loads(line)["collection"] for line in path.read_text().splitlines()] == ["first"] * 4 + ["second"]
