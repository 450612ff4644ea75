"""Verdicts, keys and records that do not fit are refused in one sentence with file and line."""

import json

import pytest

from eval.comparison import Comparison
from eval.judges.readers.results import read_results

SFT, PROXY = "sft-seed0", "proxy-prefix-seed0"
COLUMNS = ("id", "pref", "label_a", "label_b")


@pytest.fixture
def sent(run, records, simulated, tmp_path):
    """The first sheet of reader 1 and the file with its verdicts."""
    run()
    (path, *_) = simulated.sheets(1)
    rows = simulated.answers(path, 1)
    return rows, simulated.send("one.csv", rows, columns=COLUMNS)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[2].update(id="zzzzzzzzzz"), "line 4: 'zzzzzzzzzz' is no pair of these sittings"),
        (lambda rows: rows[2].update(pref="C"), "line 4: pref of .* must be one of A, B, T, got 'C'"),
        (lambda rows: rows[0].update(label_b=""), "line 2: label_b of .* must be one of R, C, H, V, N, and is empty"),
        (lambda rows: rows[1].update(label_a="X"), "line 3: label_a of .* must be one of R, C, H, V, N, got 'X'"),
        (lambda rows: rows[1].update(pref=""), "line 3: pref of .* must be one of A, B, T, and is empty"),
        (lambda rows: rows.append(rows[0]), r"line \d+: .* has a verdict in .*one.csv, line 2 already: keep one"),
        (lambda rows: [row.update(pref="", label_a="", label_b="") for row in rows], "holds no verdict yet"),
    ],
)
def test_a_verdict_that_does_not_fit_is_refused(run, sent, simulated, tmp_path, change, message):
    rows, path = sent
    change(rows)
    simulated.send(path.name, rows, columns=COLUMNS)
    with pytest.raises(ValueError, match=f"one.csv.*{message}"):
        run()
    assert not (tmp_path / "readers" / "results.json").exists()
    assert simulated.record(PROXY)["reader_labels"] is None


@pytest.mark.fault
def test_the_line_is_that_of_the_row(run, sent, simulated, tmp_path):
    """Also if cells have several lines, and in JSON."""
    rows, path = sent
    for row in rows[:2]:
        row["prompt"] = "one\ntwo\nthree"
    rows[2]["pref"] = "X"
    simulated.send(path.name, rows)
    with pytest.raises(ValueError, match=r"one.csv, line 8: pref of"):
        run()
    path.unlink()
    verdicts = [{key: row[key] for key in COLUMNS} for row in rows]
    path.with_suffix(".json").write_text(json.dumps({"verdicts": verdicts}, indent=0))
    with pytest.raises(ValueError, match=r"one.json, line 16: pref of"):
        run()


@pytest.mark.fault
def test_a_file_of_two_sittings_is_refused(run, sent, simulated, tmp_path):
    """Lines of another sitting, or of another reader: somebody mixed them up."""
    rows, path = sent
    for other in (simulated.sheets(1)[1], simulated.sheets(2)[0]):
        simulated.send(path.name, [*rows, *simulated.answers(other, 1)[:1]])
        with pytest.raises(
            ValueError, match=r"line \d+: \w+ is of reader\d/sitting\d, but .*, line \d+ is of reader1/sitting1"
        ):
            run()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xlsx", "", "a.xlsx is a spreadsheet: save it as CSV"),
        ("a.csv", "id,pref,label_a\n", "a.csv, line 1: there is no column label_b"),
        ("a.csv", "", "a.csv, line 1: there is no column id, pref, label_a, label_b"),
        ("a.json", '[\n{"id": "b"', "a.json, line 2: this is no JSON"),
        ("a.json", '{"verdicts": 3}', "a.json, line 1: this is no list of verdicts"),
        ("a.json", "[1]", "a.json, line 1: this is no list of verdicts"),
    ],
)
def test_a_damaged_file_is_refused(run, records, simulated, tmp_path, name, text, message):
    run()
    (simulated.verdicts / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.fault
def test_records_and_settings_that_changed_are_refused(run, sent, records, simulated, tmp_path):
    with pytest.raises(ValueError, match=r"other settings \(different: readers\): choose another --output_dir"):
        run(readers=3)
    with pytest.raises(ValueError, match=r"--overwrite would lose the key of .*one.csv: move"):
        run(overwrite=True)
    run()
    records[PROXY]["responses"][0] += " more"
    simulated.write(records)
    with pytest.raises(ValueError, match=f"records/{PROXY}.json has other responses than when its pairs were"):
        run()
    with pytest.raises(ValueError, match=f"is of other responses than {PROXY}.json has now"):
        read_results(Comparison.read(tmp_path), tmp_path)
    (tmp_path / "records" / f"{PROXY}.json").unlink()
    with pytest.raises(ValueError, match=f"records/{PROXY}.json is not there, but was when"):
        run()
    (tmp_path / "readers" / "key.json").write_text("{}")
    with pytest.raises(ValueError, match=r"key.json is damaged \(it lacks duels, records, settings, sheets\)"):
        run()
    (tmp_path / "readers" / "key.json").unlink()
    with pytest.raises(ValueError, match=r"one.csv has verdicts, but .*key.json, which tells the sides, is not there"):
        run()


@pytest.mark.fault
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_sheet_that_was_filled_in_place_is_not_lost(run, records, simulated, overwrite):
    run()
    path = simulated.sheets(2)[1]
    simulated.send("filled.csv", simulated.answers(path, 2)).rename(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"reader2/sitting2.csv has verdicts: move it to .*/verdicts to have"):
        run(overwrite=overwrite)
    assert path.read_bytes() == before
    path.rename(simulated.verdicts / "filled.csv")
    assert "11 verdicts count" in run()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda results: results.clear(),
            r"\(it lacks duels, labels, records, titles\): delete it, and import",
        ),
        (
            lambda results: results["duels"][0].update(wins="3"),
            r"\(it.duels.0.wins must be a whole number, got '3'",
        ),
        (lambda results: results["duels"][1]["agreement"].pop("kappa"), r"\(it.duels.1.agreement lacks kappa"),
    ],
)
def test_damaged_results_are_refused(run, sent, simulated, damage, message):
    run()
    results = simulated.results()
    comparison = Comparison.read(simulated.folder)
    assert read_results(comparison, simulated.folder) == results
    damage(results)
    path = simulated.folder / "readers" / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"results.json is damaged {message}"):
        read_results(comparison, simulated.folder)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"results.json is no JSON"):
        read_results(comparison, simulated.folder)


@pytest.mark.fault
def test_nothing_to_read(run, records, simulated, tmp_path):
    for record in records.values():
        record["responses"] = records[SFT]["responses"]
    simulated.write(records)
    with pytest.raises(ValueError, match="no pair to read: all responses are the same"):
        run()
    with pytest.raises(ValueError, match=r"--verdicts must name folders, or files .* got 'nowhere.csv'"):
        run(verdicts=["nowhere.csv"])
