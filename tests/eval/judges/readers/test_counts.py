"""Winners, agreement and tables from readings: against numbers of the literature and counts by hand."""

import builtins
import io
import json

import numpy as np
import pytest
from rich.console import Console

from eval.comparison import Comparison, label_rate
from eval.judges.readers.counts import agreement, rates, settle
from eval.judges.readers.results import duel_table, label_table
from eval.published import Published, read_lines, write_reader_lines, write_summaries
from eval.published_columns import COLUMNS
from eval.published_tables import TABLES
from eval.report import gather
from eval.report.page import explain, render_page
from eval.report.tables import print_summary, report_markdown, tables
from eval.stats import rate_ci, seeds_mean_ci


@pytest.mark.parametrize(
    ("winners", "winner"),
    [
        (["first"], "first"),
        (["first", "second"], "tie"),
        (["first", "tie"], "tie"),
        (["second", "second"], "second"),
        (["first", "first", "second"], "first"),
        (["first", "second", "tie"], "tie"),
        (["first", "first", "second", "second"], "tie"),
    ],
)
def test_more_than_half_of_the_readers_decide(winners, winner):
    assert settle(winners) == winner


def test_the_win_rate_is_of_the_decided_pairs():
    found = rates([1.0, 1.0, 0.0, 0.5, None, 0.5])
    assert (found["n_pairs"], found["wins"], found["losses"], found["ties"]) == (5, 2, 1, 2)
    assert (found["win_rate"], found["ci95"], found["tie_rate"]) == (2 / 3, rate_ci(2, 3), 2 / 5)
    nothing = rates([0.5, None])
    assert (nothing["win_rate"], nothing["ci95"], nothing["tie_rate"]) == (None, None, 1.0)
    assert rates([None])["tie_rate"] is None


def test_cohens_kappa():
    """Two readers, 50 pairs: 20 and 15 alike, 5 and 10 not. The share by chance is 0.5, so kappa is 0.4."""
    pairs = [("first", "first")] * 20 + [("first", "second")] * 5 + [("second", "first")] * 10
    pairs += [("second", "second")] * 15
    found = agreement({str(i): {1: a, 2: b} for i, (a, b) in enumerate(pairs)} | {"alone": {1: "first"}})
    assert (found["pairs"], found["share"]) == (50, 0.7)
    assert found["kappa"] == pytest.approx(0.4)


def test_krippendorffs_alpha():
    """By the coincidences of values, as in Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", with
    three readers, and pairs that not all of them read."""
    table = ["f f f", "f f s", "s s -", "t t t", "t s t", "- f f", "s - -", "f f f", "s s s", "t - f"]
    values = {"f": "first", "s": "second", "t": "tie"}
    votes = {str(i): {k: values[v] for k, v in enumerate(row.split()) if v != "-"} for i, row in enumerate(table)}
    coincidences = np.zeros((3, 3))
    for of in votes.values():
        given = [list(values.values()).index(v) for v in of.values()]
        for i, a in enumerate(given):
            for j, b in enumerate(given):
                if i != j:
                    coincidences[a, b] += 1 / (len(given) - 1)
    n, totals = coincidences.sum(), coincidences.sum(axis=0)
    observed = n - np.trace(coincidences)
    expected = (n**2 - (totals**2).sum()) / (n - 1)
    found = agreement(votes)
    assert (found["pairs"], found["share"], found["kappa"]) == (9, 6 / 9, None)
    assert found["alpha"] == pytest.approx(1 - observed / expected)


def test_agreement_that_is_not_defined():
    assert agreement({"a": {1: "first"}}) == {"pairs": 0, "share": None, "kappa": None, "alpha": None}
    same = agreement({"a": {1: "first", 2: "first"}, "b": {1: "first", 2: "first"}})
    assert same == {"pairs": 2, "share": 1.0, "kappa": None, "alpha": None}


@pytest.mark.fault
def test_without_nltk_alpha_is_left_out(run, records, simulated, monkeypatch):
    """And the other measures stay; a sentence says what to install."""
    run()
    simulated.send_all()
    assert "needs nltk" not in run()
    (whole, *_) = simulated.results()["duels"]
    real = builtins.__import__

    def without(name, *rest, **kwargs):
        if name.startswith("nltk"):
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("eval.judges.readers.sittings.find_spec", lambda name: None)
    assert 'Krippendorff\'s alpha needs nltk and is left out: run `pip install -e ".[readers]"`.' in run()
    (found, *_) = simulated.results()["duels"]
    assert found["agreement"] == {**whole["agreement"], "alpha": None}
    assert None not in whole["agreement"].values()


# Tables and the page


@pytest.fixture
def read(run, records, simulated):
    """The comparison after both readers read everything, and its results."""
    run()
    simulated.send_all()
    run()
    return Comparison.read(simulated.folder), simulated.results()


def cells(table) -> dict[str, dict[str, str]]:
    headers, rows = table
    return {row[0]: dict(zip(headers, row, strict=True)) for row in rows}


def test_the_tables_have_what_readers_say(read, tmp_path):
    comparison, _ = read
    gains, costs = map(cells, tables(comparison))
    record = comparison.groups["best_of_n (n=4)"][0]
    low, high = record["reader_win_rate_ci95"]
    assert gains["best_of_n (n=4)"]["readers"] == f"{record['reader_win_rate_vs_sft']:.2f} [{low:.2f}, {high:.2f}]"
    assert gains["sft"]["readers"] == "n/a"
    for kind in ("everyday", "harm_adjacent"):
        counts = record["reader_labels"][kind]
        for name, letter in (("true refusals", "R"), ("nonsense", "N")):
            share = counts[letter] / sum(counts.values())
            assert label_rate(record, letter, kind) == share
            assert costs["best_of_n (n=4)"][f"{name} {kind.replace('_', '-')}"] == f"{share:.0%}"
    report = report_markdown(comparison, [], tmp_path)
    assert "| readers |" in report
    assert "Readers: share of the pairs that blind readers decided" in report
    for headers, _ in tables(comparison):
        assert all(explain(header) for header in headers)


def test_nobody_read_anything(records, simulated, tmp_path):
    comparison = Comparison.read(tmp_path)
    assert all("readers" not in headers for headers, _ in tables(comparison))
    assert "eaders" not in report_markdown(comparison, [], tmp_path)
    assert "Blind readers" not in render_page(comparison, [])


def test_several_seeds_are_a_mean_with_an_interval(read):
    """The interval is that of a rate's deviations, seed by seed and prompt by prompt."""
    comparison, _ = read
    group = comparison.groups["proxy (prefix)"]
    rate, interval = comparison.reader_win_rate(group)
    assert rate == pytest.approx(np.mean([record["reader_win_rate_vs_sft"] for record in group]))
    deviations = []
    for record in group:
        scores, mean = record["reader_scores"], record["reader_win_rate_vs_sft"]
        decided = [score in (0, 1) for score in scores]
        share = sum(decided) / len(decided)
        deviations.append([mean + d * (score - mean) / share for score, d in zip(scores, decided)])
    assert interval == pytest.approx(np.clip(seeds_mean_ci(deviations), 0, 1))
    for record in group[1:]:
        record["reader_win_rate_vs_sft"] = None
    assert comparison.reader_win_rate(group) == (group[0]["reader_win_rate_vs_sft"], group[0]["reader_win_rate_ci95"])
    assert comparison.reader_win_rate(comparison.groups["sft"]) is None


def test_the_page_shows_results_and_labels(read):
    comparison, results = read
    page = render_page(comparison, [], readers=results)
    assert '<h2 id="readers-title">Blind readers</h2>' in page
    for headers, rows in (duel_table(results), label_table(results)):
        assert all(f"<td>{cell}</td>" in page for row in rows for cell in row[1:])
        assert all(len(row) == len(headers) for row in rows)
    first = cells(duel_table(results))["best_of_n (n=4) : sft"]
    (duel,) = [duel for duel in results["duels"] if duel["first"].startswith("best")]
    assert first["readers agree"] == f"{duel['agreement']['share']:.0%}"
    assert (first["pairs"], first["same response"], first["unread"]) == ("12", "1", "0")
    counts = results["labels"]["sft-seed0.json"]["all"]
    row = cells(label_table(results))["sft, seed 0"]
    assert sum(counts.values()) == pytest.approx(12)
    assert row["true refusals"] != ""


def test_the_terminal_has_a_column_for_readers(read):
    comparison, _ = read
    buffer = io.StringIO()
    print_summary(comparison, Console(file=buffer, width=120))
    record = comparison.groups["best_of_n (n=4)"][0]
    (row,) = [line for line in buffer.getvalue().splitlines() if line.strip().startswith("best_of_n")]
    assert "readers [95 %]" in buffer.getvalue()
    assert f" {record['reader_win_rate_vs_sft']:.2f} [{record['reader_win_rate_ci95'][0]:.2f}, " in row


def test_the_report_reads_the_results(read, simulated, monkeypatch):
    monkeypatch.setattr(gather, "draw_all", lambda *_: [])
    page = gather.report(gather.make_parser().parse_args([str(simulated.folder)]))
    assert '<h2 id="readers-title">Blind readers</h2>' in page.read_text(encoding="utf-8")


def test_published_lines_of_two_methods(read, tmp_path):
    """A line for each kind, in place of the old ones; the table shows them."""
    _, results = read
    path = tmp_path / "lines.jsonl"
    others = [
        {"collection": "readers", "group": "a : b", "kind": "everyday", "first_wins": 0, "second_wins": 0, "ties": 2}
    ]
    others += [{"collection": "mine", "group": "x"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in others))
    write_reader_lines(results, path)
    write_reader_lines(results, path)
    lines = read_lines(path)
    assert lines[:2] == others
    assert len(lines) == 2 + 3 * 2
    duel = next(duel for duel in results["duels"] if duel["title"] == "proxy (prefix) : sft")
    (line,) = [x for x in lines if x["group"] == duel["title"] and x["kind"] == "harm-adjacent"]
    found = duel["by_kind"]["harm_adjacent"]
    assert [line["first_wins"], line["second_wins"], line["ties"]] == [found["wins"], found["losses"], found["ties"]]
    table = TABLES["readers"](Published(lines))
    low, high = found["ci95"]
    counts = f"{found['wins']} | {found['losses']} | {found['ties']} | {found['win_rate']:.2f} [{low:.2f}, {high:.2f}]"
    assert f"| proxy (prefix) : sft | harm-adjacent | {counts} |" in table
    assert "| a : b | everyday | 0 | 0 | 2 |  |" in table


def test_published_lines_have_readers(read, tmp_path):
    comparison, _ = read
    write_summaries(comparison, "mine", "A", tmp_path / "lines.jsonl")
    assert "reader_scores" not in json.loads((tmp_path / "lines.jsonl").read_text().splitlines()[0])
    rows = Published(read_lines(tmp_path / "lines.jsonl")).rows("mine")
    for name in ("best_of_n (n=4)", "proxy (prefix)"):
        rate, (low, high) = comparison.reader_win_rate(comparison.groups[name])
        assert COLUMNS["readers"](rows[name]) == f"{rate:.2f} [{low:.2f}, {high:.2f}]"
    assert COLUMNS["readers"](rows["sft"]) == ""
    assert COLUMNS["readers"](Published(read_lines()).rows("compare")["sft"]) == ""  # a line without the key


def test_prompts_without_kinds(run, records, simulated, tmp_path):
    for record in records.values():
        record.update(kinds=None, by_kind={})
    simulated.write(records)
    run()
    simulated.send_all()
    run()
    comparison, results = Comparison.read(tmp_path), simulated.results()
    record = comparison.groups["best_of_n (n=4)"][0]
    assert record["reader_win_rate_vs_sft"] == results["duels"][0]["win_rate"]
    assert list(record["reader_labels"]) == ["all"]
    costs = cells(tables(comparison)[1])
    assert costs["best_of_n (n=4)"]["nonsense all"] == f"{label_rate(record, 'N'):.0%}"
    write_reader_lines(results, tmp_path / "lines.jsonl")
    assert {line["kind"] for line in read_lines(tmp_path / "lines.jsonl")} == {"all"}
