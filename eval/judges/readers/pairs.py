"""Which pairs are read, on which side each response is, and in which sitting: all drawn from one seed."""

import hashlib
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from eval.comparison import Comparison, label
from eval.judges.judgements import record_name

LETTERS = "bcdfghjkmnpqrstvwxyz"  # an id of these is no number, date or word, whatever a spreadsheet makes of cells


class Duel(NamedTuple):
    """Two records whose responses are read against each other."""

    first: dict
    second: dict

    @property
    def names(self) -> tuple[str, str]:
        """File names of the two records."""
        return record_name(self.first), record_name(self.second)

    @property
    def title(self) -> str:
        """For people, e.g. `proxy (prefix) : sft`; with the seed if it is not 0."""
        names = (label(r) + (f", seed {r['seed']}" if r["seed"] else "") for r in self)
        return " : ".join(names)


@dataclass
class Item:
    """A pair of responses as one reader sees it.

    Attributes:
        id: says nothing about the pair.
        duels: names of the first and second record; several duels if their responses are the same.
        prompt: its index in the records.
        first_side: A or B, where the first record's response is.
    """

    id: str
    duels: list[tuple[str, str]]
    prompt: int
    first_side: str


@dataclass
class Sheet:
    """What one reader reads in one sitting, in this order."""

    id: str
    reader: int  # from 1
    sitting: int  # from 1
    sittings: int
    items: list[Item]

    @property
    def name(self) -> str:
        return f"reader{self.reader}/sitting{self.sitting}"


def record_sha256(record: dict) -> str:
    """Hash of what is read of a record."""
    texts = [record["prompts"], record["responses"], record["kinds"]]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=True).encode()).hexdigest()


def _named(comparison: Comparison, name: str) -> list[dict]:
    """The records of a method, of a method and variant, or the one of a file name without `.json`."""
    return [r for r in comparison.records if name in (r["method"], label(r), record_name(r).removesuffix(".json"))]


def find_duels(comparison: Comparison, asked: list[str]) -> list[Duel]:
    """The duels of `first:second` names, seed against the same seed; every record against SFT if there are none.
    SFT is always the second.

    Raises:
        ValueError: if a name fits no record, or the records of both sides have no seed in common.
    """
    if not asked:
        return [Duel(record, comparison.sft) for record in comparison.records if record["method"] != "sft"]
    duels: dict[frozenset, Duel] = {}
    for names in asked:
        sides = [_named(comparison, name.strip()) for name in names.split(":")]
        if len(sides) != 2 or not all(sides):
            known = ", ".join(dict.fromkeys([r["method"] for r in comparison.records] + list(comparison.groups)))
            raise ValueError(f"--reader_pairs must be <first>:<second>, each one of {known}, got {names!r}.")
        single = min(map(len, sides)) == 1
        found = [Duel(a, b) for a in sides[0] for b in sides[1] if a is not b and (single or a["seed"] == b["seed"])]
        if not found:
            raise ValueError(f"--reader_pairs {names} fits no two records of one seed: name single records.")
        for duel in found:
            duel = Duel(*reversed(duel)) if duel.first["method"] == "sft" else duel
            duels.setdefault(frozenset(duel.names), duel)
    return list(duels.values())


def differing(duel: Duel) -> list[int]:
    """The prompts whose two responses differ; the others are ties, and nobody reads them."""
    return [i for i, (a, b) in enumerate(zip(duel.first["responses"], duel.second["responses"])) if a != b]


def _shared_pairs(duels: list[Duel]) -> list[tuple[int, list[tuple[str, str]]]]:
    """(prompt, duels) of each pair of texts that differ: what two duels have in common is read once."""
    pairs: dict[tuple, list[tuple[str, str]]] = {}
    for duel in duels:
        for i in differing(duel):
            texts = duel.first["responses"][i], duel.second["responses"][i]
            pairs.setdefault((i, *texts), []).append(duel.names)
    return [(prompt, names) for (prompt, *_), names in pairs.items()]


def make_sheets(duels: list[Duel], *, readers: int, most: int, seed: int) -> list[Sheet]:
    """The sheets of all readers. Every reader gets every pair, readers 1, 3, ... on one side, 2, 4, ... on the other.

    The pairs of one prompt are in different sittings, because a response that comes again and again tells a reader
    which one is the LM's. So there are at least as many sittings as methods that answer a prompt differently.

    Args:
        most: pairs of a sitting.
    """
    texts = [[duel.names, *map(record_sha256, duel)] for duel in duels]
    drawn_from = f"{seed} {hashlib.sha256(json.dumps(texts).encode()).hexdigest()}"
    rng = random.Random(drawn_from)
    pairs = _shared_pairs(duels)
    rng.shuffle(pairs)
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in pairs))}
    pairs.sort(key=lambda pair: place[pair[0]])  # those of one prompt follow one another
    sides = [rng.choice("AB") for _ in pairs]
    sittings = max([math.ceil(len(pairs) / most), *Counter(prompt for prompt, _ in pairs).values()])
    return [
        _sheet(f"{drawn_from} {reader} {k}", pairs[k::sittings], sides[k::sittings], reader, k + 1, sittings)
        for reader in range(1, readers + 1)
        for k in range(sittings)
    ]


def _sheet(drawn_from: str, pairs: list, sides: list[str], reader: int, sitting: int, sittings: int) -> Sheet:
    """One sheet, in an order of its own."""
    rng = random.Random(drawn_from)
    names: dict[str, None] = {}
    while len(names) <= len(pairs):  # one for the sheet, one for each pair
        names["".join(rng.choices(LETTERS, k=10))] = None
    swapped = {"A": "B", "B": "A"} if reader % 2 == 0 else {"A": "A", "B": "B"}
    sheet_id, *ids = names
    items = [Item(id, duels, i, swapped[side]) for id, (i, duels), side in zip(ids, pairs, sides, strict=True)]
    rng.shuffle(items)
    return Sheet(sheet_id, reader, sitting, sittings, items)
