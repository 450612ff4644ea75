"""From the export over readers who know nothing but their sheets to the records, against a count by brute force."""

import csv
import io
import json
import re
from collections import Counter

import pytest

from eval.comparison import Comparison
from eval.judges.readers.pairs import find_duels
from eval.judges.readers.results import read_results
from eval.records import READER_KEYS, READER_KIND_KEYS
from eval.stats import rate_ci

NAMES = SFT, BEST, PROXY, OTHER = "sft-seed0", "best_of_n-n=4-seed0", "proxy-prefix-seed0", "proxy-prefix-seed1"
COLUMNS = ("id", "pref", "label_a", "label_b")


def expected(opinion, records: dict, name: str, against: str, kind: str | None = None) -> dict:
    """By brute force from the records: both readers' opinions of every pair, where they differ a tie."""
    first, second = records[name], records[against]
    count, same = Counter(), 0
    for i, (prompt, a, b) in enumerate(zip(first["prompts"], first["responses"], second["responses"])):
        if kind not in (None, first["kinds"][i]):
            continue
        if a == b:
            count[0.5] += 1
            continue
        (one, _), (two, _) = (opinion(reader, prompt, a, b) for reader in (1, 2))
        count[one if one == two else 0.5] += 1
        same += one == two
    decided = count[1.0] + count[0.0]
    return {
        "rate": count[1.0] / decided,
        "ci95": rate_ci(count[1.0], decided),
        "ties": count[0.5] / sum(count.values()),
        "agreement": same / sum(a != b for a, b in zip(first["responses"], second["responses"])),
    }


def expected_labels(opinion, records: dict, name: str, others: list[str], kind: str | None = None) -> dict[str, float]:
    """Each response counts once, in equal parts for each time that it was read."""
    record, counts = records[name], Counter()
    for i, prompt in enumerate(record["prompts"]):
        text = record["responses"][i]
        pairs = {records[other]["responses"][i] for other in others} - {text}
        given = [opinion(reader, prompt, text, other)[1] for other in pairs for reader in (1, 2)]
        for label in given if kind in (None, record["kinds"][i]) else []:
            counts[label] += 1 / len(given)
    return {label: pytest.approx(counts[label]) for label in "RCHVN"}


def test_what_readers_say_is_in_the_records(run, records, simulated, tmp_path):
    before = {name: simulated.record(name) for name in NAMES}
    run()
    simulated.send_all()
    printed = run()
    after = {name: simulated.record(name) for name in NAMES}
    for name in (BEST, PROXY, OTHER):
        found, record = expected(simulated.opinion, records, name, SFT), after[name]
        assert record["reader_win_rate_vs_sft"] == found["rate"]
        assert record["reader_win_rate_ci95"] == found["ci95"]
        assert record["reader_tie_rate"] == found["ties"]
        assert record["reader_agreement"] == found["agreement"]
        assert record["reader_labels"]["all"] == expected_labels(simulated.opinion, records, name, [SFT])
        for kind, of_kind in record["by_kind"].items():
            found = expected(simulated.opinion, records, name, SFT, kind)
            assert [of_kind[key] for key in READER_KIND_KEYS] == [found["rate"], found["ci95"], found["ties"]]
            assert record["reader_labels"][kind] == expected_labels(simulated.opinion, records, name, [SFT], kind)
    sft = after[SFT]
    assert sft["reader_labels"]["all"] == expected_labels(simulated.opinion, records, SFT, [BEST, PROXY, OTHER])
    assert sft["reader_win_rate_vs_sft"] is None
    for name, record in after.items():  # nothing else in a record changes
        for of in (record, *record["by_kind"].values()):
            for key in READER_KEYS:
                of.pop(key, None)
        old = {key: value for key, value in before[name].items() if key not in READER_KEYS}
        for of in old["by_kind"].values():
            for key in READER_KIND_KEYS:
                of.pop(key, None)
        assert record == old
    assert "verdicts count, 0 are missing" in printed
    again = read_results(Comparison.read(tmp_path), tmp_path)
    assert run() == printed
    assert read_results(Comparison.read(tmp_path), tmp_path) == again


def test_two_methods_against_each_other(run, records, simulated, tmp_path):
    run(reader_pairs=["proxy:best_of_n", "sft:best_of_n"])
    simulated.send_all()
    run(reader_pairs=["proxy:best_of_n", "sft:best_of_n"])
    results = simulated.results()
    found = {(duel["first"][:-5], duel["second"][:-5]): duel for duel in results["duels"]}
    assert list(found) == [(PROXY, BEST), (OTHER, BEST), (BEST, SFT)]
    for (first, second), duel in found.items():
        by_hand = expected(simulated.opinion, records, first, second)
        assert (duel["win_rate"], duel["ci95"], duel["tie_rate"]) == (
            by_hand["rate"],
            by_hand["ci95"],
            by_hand["ties"],
        )
    values = {name: simulated.record(name) for name in NAMES}
    assert values[BEST]["reader_win_rate_vs_sft"] == expected(simulated.opinion, records, BEST, SFT)["rate"]
    assert values[PROXY]["reader_win_rate_vs_sft"] is None  # nobody read it against SFT
    assert values[PROXY]["reader_labels"] is not None


def test_a_sheet_tells_nothing(run, records, simulated, tmp_path):
    """Every pair that differs once for each reader, sides random and opposite for the second, no name of a method."""
    printed = run(sitting_pairs=11)
    shown = {1: {}, 2: {}}
    ids, sides = [], Counter()
    for reader in (1, 2):
        for path in simulated.sheets(reader):
            rows = simulated.read(path)
            assert len(rows) <= 11
            assert list(rows[0]) == ["id", "prompt", "response_a", "response_b", "pref", "label_a", "label_b"]
            assert len({row["prompt"] for row in rows}) == len(rows)  # no response of SFT comes again
            for row in rows:
                assert row["pref"] == row["label_a"] == row["label_b"] == ""
                ids.append(row["id"])
                prompt, a, b = (row[key] for key in ("prompt", "response_a", "response_b"))
                i = records[SFT]["prompts"].index(prompt)
                sides[reader, records[SFT]["responses"][i] == a] += 1
                assert (i, frozenset((a, b))) not in shown[reader]
                shown[reader][i, frozenset((a, b))] = (a, b)
    pairs = {
        (i, frozenset(texts))
        for name in (BEST, PROXY, OTHER)
        for i, texts in enumerate(zip(records[name]["responses"], records[SFT]["responses"]))
        if len(set(texts)) == 2
    }
    assert len(pairs) == 32  # of 36: two are the same, two are read for both proxies
    assert shown[1].keys() == shown[2].keys() == pairs
    assert all(shown[2][pair] == texts[::-1] for pair, texts in shown[1].items())
    assert len(set(ids)) == 64
    assert all(re.fullmatch("[b-df-hj-np-tv-z]{10}", name) for name in ids)
    assert min(sides[reader, is_a] for reader in (1, 2) for is_a in (True, False)) >= 8
    orders = [[(row["prompt"]) for row in simulated.read(simulated.sheets(reader)[0])] for reader in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert "Pairs to read: 32; sittings: 3, of at most 11" in printed
    assert "proxy (prefix) : sft: 12 prompts, 1 with the same response twice" in printed
    names = re.compile("best_of|proxy|sft|prefix|seed", re.IGNORECASE)
    for path in (tmp_path / "readers" / "reader1").iterdir():
        assert not names.search(path.read_text(encoding="utf-8")), path
        assert not names.search(path.name)
    assert (tmp_path / "readers" / "reader1" / "guidelines.md").read_text().count(
        "Cut off at the limit is no fault"
    ) == 1


def test_a_spreadsheet_runs_no_response(run, records, simulated):
    run()
    texts = [path.read_text(encoding="utf-8-sig") for path in simulated.sheets(1)]
    cells = [cell for text in texts for row in csv.reader(io.StringIO(text)) for cell in row]
    assert f"'{records[BEST]['responses'][0]}" in cells
    assert "'- a list\n- of two" in cells
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def test_the_seed_decides(run, records, simulated, tmp_path):
    def texts() -> dict[str, str]:
        return {str(p): p.read_text() for k in (1, 2, 3) for p in simulated.sheets(k)}

    run()
    first = texts()
    assert "Pairs to read" in run()  # the same again, as long as nothing came back
    assert texts() == first
    run(readers=3, overwrite=True)
    assert {path: text for path, text in texts().items() if "reader3" not in path} == first
    assert len(texts()) == len(first) * 3 / 2
    run(reader_seed=1, overwrite=True)
    assert texts().keys() == first.keys()  # nothing of an earlier export stays
    assert not any(texts()[path] == text for path, text in first.items())


def test_partial_verdicts_count(run, records, simulated, tmp_path):
    """Reader 1 stopped after 5 pairs of a sheet, reader 2 after 3: what one of them read counts with one reader."""
    run(sitting_pairs=16)
    simulated.send_all(keep=lambda reader, i: i < (5 if reader == 1 else 3))
    printed = run(sitting_pairs=16)
    assert "reader1/sitting1: 6 of 11 verdicts are missing." in printed
    assert "24 verdicts count, 40 are missing." in printed
    read = {1: set(), 2: set()}
    for reader, n in ((1, 5), (2, 3)):
        for path in simulated.sheets(reader):
            for row in simulated.read(path)[:n]:
                texts = frozenset((row["response_a"], row["response_b"]))
                read[reader].add((row["prompt"], texts))
    record, sft = records[PROXY], records[SFT]
    scores = []
    for prompt, a, b in zip(record["prompts"], record["responses"], sft["responses"]):
        given = [simulated.opinion(k, prompt, a, b)[0] for k in (1, 2) if (prompt, frozenset((a, b))) in read[k]]
        scores.append(0.5 if a == b or len(set(given)) == 2 else given[0] if given else None)
    assert simulated.record(PROXY)["reader_scores"] == scores
    assert None in scores


@pytest.mark.parametrize("form", ["json", "list", "semicolons", "filled"])
def test_other_forms_of_the_same_verdicts(run, records, simulated, tmp_path, form):
    run()
    simulated.send_all()
    run()
    before = simulated.results()
    for path in list(simulated.verdicts.iterdir()):
        rows = simulated.read(path)
        path.unlink()
        if form == "semicolons":
            simulated.send(path.name, rows, delimiter=";", columns=("id", "label_b", "pref", "label_a"))
        elif form == "filled":  # as a spreadsheet saves it that knows no UTF-8, small letters too
            for row in rows:
                row.update(prompt="caf\u00e9", pref=row["pref"].lower(), label_a=f" {row['label_a']}")
            simulated.send(path.name, rows, columns=("prompt", *COLUMNS))
            path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))
        else:
            verdicts = [{key: row[key] for key in COLUMNS} for row in rows]
            content = verdicts if form == "list" else {"verdicts": verdicts}
            path.with_suffix(".json").write_text(json.dumps(content, indent=1))
    run()
    assert simulated.results() == before


def test_files_elsewhere(run, records, simulated, tmp_path):
    run()
    simulated.send_all()
    run()
    before = simulated.results()
    simulated.verdicts.rename(tmp_path / "mail")
    assert "Pairs to read" in run()
    files = sorted(map(str, (tmp_path / "mail").iterdir()))
    assert "0 are missing" in run(verdicts=[*files])
    assert simulated.results() == before
    assert "0 are missing" in run(verdicts=[str(tmp_path / "mail")])


def test_names_of_pairs(records, tmp_path):
    comparison = Comparison.read(tmp_path)
    found = find_duels(comparison, ["proxy (prefix):sft", "proxy-prefix-seed1:best_of_n-n=4-seed0", "sft:proxy"])
    assert [duel.title for duel in found] == [
        "proxy (prefix) : sft",
        "proxy (prefix), seed 1 : sft",
        "proxy (prefix), seed 1 : best_of_n (n=4)",
    ]
    for wrong in ("proxy", "proxy:nothing", "a:b:c", ":", "sft:sft"):
        with pytest.raises(ValueError, match="--reader_pairs"):
            find_duels(comparison, [wrong])


def test_seeds_meet_the_same_seed(records, simulated, tmp_path):
    simulated.write({"more": {**records[BEST], "seed": 1}})
    comparison = Comparison.read(tmp_path)
    titles = [duel.title for duel in find_duels(comparison, ["proxy:best_of_n"])]
    assert titles == ["proxy (prefix) : best_of_n (n=4)", "proxy (prefix), seed 1 : best_of_n (n=4), seed 1"]
    with pytest.raises(ValueError, match="--reader_pairs proxy:proxy fits no two records of one seed"):
        find_duels(comparison, ["proxy:proxy"])
