"""The data set of preferences that is shipped: what its card says holds."""

import itertools
import json
import re
from collections import Counter
from functools import cache

from datasets import load_dataset

from trl_proxy.reading import check_pairs, read_dataset
from trl_proxy.rewards.preference import EMBEDDED_REWARD

FOLDER = EMBEDDED_REWARD.parent / "preferences"
SPLITS = ("train", "validation", "test")
KINDS = ("everyday", "harm_adjacent")


@cache
def rows(config: str | None = None) -> dict[str, list[dict]]:
    return {split: list(read_dataset(str(FOLDER), split, config=config)) for split in SPLITS}


def card_rows(first_cells) -> dict[str, list[str]]:
    lines = (FOLDER / "README.md").read_text("utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells if row[0] in first_cells}


def test_splits_share_no_prompt_and_hold_no_held_out_one():
    prompts = {s: {row["prompt"] for config in (None, "ties") for row in rows(config)[s]} for s in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not prompts[one] & prompts[other]
    embedded = [json.loads(line) for line in (FOLDER.parent / "prompts.jsonl").read_text("utf-8").splitlines()]
    held_out = {row["prompt"] for row in embedded if row["split"] != "train"}
    assert held_out
    assert not held_out & set().union(*prompts.values())


def test_the_card_counts_what_the_files_hold():
    pairs, ties = rows(), rows("ties")
    for split in SPLITS:
        everything = pairs[split] + ties[split]
        kinds = Counter(row["kind"] for row in pairs[split])
        counts = [len(pairs[split]), len(ties[split]), len({row["prompt"] for row in everything})]
        assert card_rows(SPLITS)[split] == [f"{n:,}" for n in (*counts, *(kinds[kind] for kind in KINDS))]
    wins, losses = Counter(), Counter()
    for row in itertools.chain(*pairs.values()):
        wins[row["chosen_source"], row["kind"]] += 1
        losses[row["rejected_source"], row["kind"]] += 1
    sources = {source for source, _ in wins}
    shares = {
        s: [f"{wins[s, kind] / (wins[s, kind] + losses[s, kind]):.2f}" for kind in KINDS] for s in sorted(sources)
    }
    table = card_rows({f"`{source}`" for source in sources})
    assert {source.strip("`"): cells[-2:] for source, cells in table.items()} == shares


def test_the_rows_are_what_trl_and_the_card_say(tmp_path):
    for split in SPLITS:
        assert len(check_pairs(read_dataset(str(FOLDER), split), "preferences")) == len(rows()[split])
    for row in itertools.chain(*rows().values()):
        assert all(row[key].strip() for key in ("prompt", "chosen", "rejected"))
        assert row["chosen"] != row["rejected"]
        assert re.fullmatch("[RCHVN]{1,2}", row["chosen_labels"])
        assert len(row["rejected_labels"]) == len(row["chosen_labels"])
        assert row["kind"] in KINDS
    # Not from the shared cache: for a folder with such a card `datasets` keeps the rows of an earlier state.
    assert len(load_dataset(str(FOLDER), split="test", cache_dir=tmp_path)) == len(rows()["test"])
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 3_000_000
