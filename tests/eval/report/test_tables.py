"""Tests of `eval.report.tables`: cells, order and escaping, from records alone."""

import io
import re

from rich.console import Console

from eval.comparison import Comparison, label
from eval.report.tables import escape, markdown_table, print_summary, report_markdown, samples_markdown, tables
from eval.stats import mean_ci, seeds_mean_ci


def test_table_cells(records):
    (gains, gain_rows), (costs, cost_rows) = tables(Comparison(records))
    assert gains == ["method", "seeds", "reward", "Δ vs SFT", "win rate", "Δ everyday", "Δ harm-adjacent", "gold Δ"]
    assert gain_rows[0] == ["sft", "1", "1.50", "n/a", "n/a", "n/a", "n/a", "n/a"]
    low, high = mean_ci([0.5, 0, 0, 0.5])
    best_of_2 = gain_rows[1]
    assert best_of_2[:4] == ["best_of_n (n=2)", "1", "1.75", f"+0.25 [{low:+.2f}, {high:+.2f}]"]
    assert best_of_2[4].startswith("0.75 [0.30, 0.95]")  # 2 wins and 2 ties of 4: Wilson
    intervals = [mean_ci(deltas) for deltas in ([0.5, 0], [0, 0.5])]
    assert best_of_2[5:] == [*(f"+0.25 [{low:+.2f}, {high:+.2f}]" for low, high in intervals), "n/a"]
    assert gain_rows[3][:3] == ["proxy (prefix)", "2", "2.50"]
    assert gain_rows[3][4] == "0.81 [0.00, 1.00]"  # two seeds, not beyond what a rate can be
    low, high = seeds_mean_ci([[1, 1], [2, 2]])
    assert gain_rows[3][5] == f"+1.50 [{low:+.2f}, {high:+.2f}]"
    assert gain_rows[3][6].startswith("+0.50 [")
    assert costs[1:4] == ["trainable", "refusals everyday", "refusals harm-adjacent"]
    assert cost_rows[0] == ["sft", "0", "0%", "0%", "-1.00", "1.00", "1.00"]
    assert cost_rows[3] == ["proxy (prefix)", "1,000 (1.00%)", "0%", "0%", "-1.00", "1.00", "0.50"]


def test_tables_without_sft_and_without_kinds(make_record):
    record = make_record("proxy", [1.0, 2.0, 1.0, 2.0], kinds=None, by_kind={}, tokens_per_second_sft=None)
    (gains, gain_rows), (costs, cost_rows) = tables(Comparison([record]))
    assert gain_rows == [["proxy", "1", "1.50", "n/a", "n/a", "n/a"]]
    assert costs[2] == "refusals all"
    assert cost_rows[0][-1] == "n/a"
    assert len(gains) == len(gain_rows[0])


def shown_in(width: int, records) -> str:
    buffer = io.StringIO()
    print_summary(Comparison(records), Console(file=buffer, width=width))
    assert max(map(len, buffer.getvalue().splitlines())) <= width
    return buffer.getvalue()


def test_the_terminal_shows_a_small_table(records):
    """No cell is folded in 80 columns; a method with one variant goes by its name alone."""
    table = shown_in(80, records).partition("Gains:")[0]
    lines = [line.split("  ") for line in table.splitlines()]
    rows = {words[0].strip(): [word.strip() for word in words[1:] if word.strip()] for words in lines}
    assert rows["sft, the LM"][0] == "1.50"
    (gains, gain_rows), _ = tables(Comparison(records))
    for row in gain_rows[1:]:
        name = "proxy" if row[0].startswith("proxy") else row[0]
        assert rows[name][:2] == [row[gains.index("reward")], row[gains.index("Δ vs SFT")]]


def test_the_terminal_shows_three_answers_of_both(make_record):
    """Two harm-adjacent prompts and an everyday one on which they differ, each with both answers and rewards."""
    kinds = ["everyday", "harm_adjacent"] * 4
    prompts = [f"question {i}?" for i in range(8)]
    shared = {"kinds": kinds, "prompts": prompts}
    sft = make_record("sft", list(map(float, range(8))), responses=[f"plain {i}" for i in range(8)], **shared)
    answers = ["plain 0", "plain 1", *(f"gated [red] {i}\nsecond" for i in range(2, 8))]
    proxy = make_record("proxy", [i + 0.5 for i in range(8)], sft, responses=answers, **shared)
    text = shown_in(80, [proxy, sft])
    asked = [line for line in text.splitlines() if line.startswith("question")]
    assert asked == ["question 3?  (harm-adjacent)", "question 5?  (harm-adjacent)", "question 2?  (everyday)"]
    for i in (3, 5, 2):
        assert f"the LM +{i}.00 plain {i}" in text
        assert f"proxy  +{i}.50 gated [red] {i} second" in text


def test_without_a_trained_method_there_are_no_answers(records):
    assert "the LM +" not in shown_in(80, [r for r in records if r["method"] != "proxy"])


def test_markdown_table():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_escape_keeps_a_cell_one_cell():
    text = "a | b\nc <script>*x*</script> [y](z) `w` & $m$"
    escaped = escape(text)
    assert "\n" not in escaped
    assert not re.search(r"(?<!\\)[|*\[\]`$]", escaped)
    assert "<script>" not in escaped
    assert escape("a\r\nb\rc") == "a<br>b<br>c"
    assert escape("plain text, it's all.") == "plain text, it's all."


def test_samples_show_all_methods_and_the_largest_losses(records):
    samples = samples_markdown(Comparison(records), per_kind=1, worst=1)
    assert "## Everyday prompts: the first 1" in samples
    assert samples.count("**question 0**") == 1
    assert "losses of best_of_n" not in samples  # they never lose
    assert "## Largest losses of proxy (prefix) against SFT" in samples
    last = samples.split("## Largest losses of proxy (prefix) against SFT")[1]
    assert "**question 3**" in last
    assert "| proxy (prefix) | 2.00 | answer 3 |" in last  # the first seed's
    assert [line.split(" | ")[0] for line in last.splitlines() if "answer" in line] == [
        f"| {name}" for name in Comparison(records).groups
    ]


def test_report_links_what_it_stands_beside(records, tmp_path):
    report = report_markdown(Comparison(records), [tmp_path / "plots" / "gains.png"], tmp_path)
    assert "![gains](plots/gains.png)" in report
    assert "- command: `python scripts/compare.py`" in report
    for headers, rows in tables(Comparison(records)):
        assert markdown_table(headers, rows) in report


def test_label(records):
    assert [label(record) for record in records[-2:]] == ["proxy (prefix)", "sft"]
