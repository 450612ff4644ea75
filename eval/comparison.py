"""[`Comparison`]: the records of one comparison, grouped once, and what they say over seeds.

Tables, plots, the page and the judges are given this object, so none of them groups records or looks for SFT itself.
"""

import os
import re
from collections.abc import Callable

import numpy as np

from eval.records import read_records
from eval.stats import Interval, paired_delta, seeds_mean_ci, seeds_rate_ci, win_scores


def label(record: dict) -> str:
    """Name of a method in tables and plots, e.g. `best_of_n (n=8)`."""
    return record["method"] if record["variant"] is None else f"{record['method']} ({record['variant']})"


def kind_title(kind: str) -> str:
    """`harm_adjacent` -> `harm-adjacent`."""
    return kind.replace("_", "-")


def mean_over_seeds(group: list[dict], *keys: str) -> float | None:
    """Mean over the records of a (nested) key; None if a record has none."""
    values = []
    for record in group:
        for key in keys:
            record = record[key]
        values.append(record)
    return None if None in values else float(np.mean(values))


def label_rate(record: dict, letter: str, kind: str | None = None) -> float | None:
    """Share of a record's responses, of those that blind readers read, with this label; None if nobody read any."""
    counts = (record["reader_labels"] or {}).get(kind or "all")
    return counts[letter] / sum(counts.values()) if counts and sum(counts.values()) else None


class Comparison:
    """The records of one comparison.

    Attributes:
        groups: label of a method and variant -> its records, a seed each. SFT comes first, the others by name, n in
            its order.
        records: all of them, in the order of the groups.
        sft: the record that the others are measured against; None if there is none.
        kinds: kinds of prompts, sorted.

    Raises:
        ValueError: there are no records, or they are not over the same prompts, LM, reward and length.
    """

    def __init__(self, records: list[dict]):
        if not records:
            raise ValueError("there are no records to compare: run scripts/compare.py first.")
        for name in ("prompts_sha256", "model", "reward_model", "max_new_tokens"):
            if len(values := sorted({str(record[name]) for record in records})) > 1:
                raise ValueError(
                    f"the records differ in {name} ({', '.join(values)}) and cannot be compared: evaluate all of them "
                    "again with --overwrite, or keep them in different output folders."
                )
        self.records = sorted(records, key=_in_order)
        self.groups: dict[str, list[dict]] = {}
        for record in self.records:
            self.groups.setdefault(label(record), []).append(record)
        self.sft = next((record for record in self.records if record["method"] == "sft"), None)
        self.kinds = sorted({kind for record in self.records for kind in record["by_kind"]})

    @classmethod
    def read(cls, output_dir: str | os.PathLike) -> "Comparison":
        """The records under an output folder of scripts/compare.py."""
        return cls(read_records(output_dir))

    def only(self, keep: Callable[[dict], bool]) -> "Comparison":
        """The comparison of those records alone for which `keep` is true."""
        return Comparison([record for record in self.records if keep(record)])

    @property
    def is_read(self) -> bool:
        """Whether blind readers read any of the records."""
        return any(record["reader_labels"] for record in self.records)

    @property
    def others(self) -> dict[str, list[dict]]:
        """The groups that are measured against SFT."""
        return {name: group for name, group in self.groups.items() if group[0]["method"] != "sft"}

    def gain(
        self, group: list[dict], kind: str | None = None, gold: bool = False
    ) -> tuple[float, Interval | None] | None:
        """Mean paired gain over SFT of one method's seeds and its interval; None if there is nothing to pair with.

        Args:
            group: records of one method and variant.
            kind: prompts of this kind only.
            gold: by the reward that no method trains on.
        """
        sft, name = self.sft, "gold_rewards" if gold else "rewards"
        if sft is None or group[0]["method"] == "sft" or None in [record[name] for record in [sft, *group]]:
            return None
        if len(group) == 1:
            source, prefix = group[0] if kind is None else group[0]["by_kind"][kind], "gold_" if gold else ""
            return source[f"{prefix}delta_vs_sft"], source[f"{prefix}delta_ci95"]
        rows = [i for i in range(sft["n_prompts"]) if kind is None or sft["kinds"][i] == kind]
        deltas = np.stack([paired_delta(record[name], sft[name])[rows] for record in group])  # (seeds, prompts)
        return float(deltas.mean()), seeds_mean_ci(deltas)

    def win_rate(self, group: list[dict]) -> tuple[float, Interval | None] | None:
        """Win rate against SFT of one method's seeds, ties as half, and its interval; None if there is no pair."""
        if self.sft is None or group[0]["method"] == "sft":
            return None
        if len(group) == 1:
            return group[0]["win_rate_vs_sft"], group[0]["win_rate_ci95"]
        scores = np.stack([win_scores(record["rewards"], self.sft["rewards"]) for record in group])
        return float(scores.mean()), seeds_rate_ci(scores)

    def reader_win_rate(self, group: list[dict]) -> tuple[float, Interval | None] | None:
        """Blind readers' win rate against SFT, of the decided pairs, and its interval; None if nobody read a pair.

        Of several seeds, the mean over those that were read. Its interval is that of their deviations to first order
        (delta method), since a rate of decided pairs is a ratio.
        """
        read = [record for record in group if record["reader_win_rate_vs_sft"] is not None]
        if len(read) < 2:
            return (read[0]["reader_win_rate_vs_sft"], read[0]["reader_win_rate_ci95"]) if read else None
        scores = np.array([record["reader_scores"] for record in read], dtype=float)  # NaN for an unread pair
        means = np.array([[record["reader_win_rate_vs_sft"]] for record in read])
        decided = (scores == 0) | (scores == 1)
        deviations = np.where(decided, scores - means, 0) / decided.mean(axis=1, keepdims=True)
        return float(means.mean()), seeds_rate_ci(means + deviations)


def _in_order(record: dict):
    padded = re.sub(r"\d+", lambda number: number[0].zfill(9), label(record))  # n=2 before n=16
    return record["method"] != "sft", padded, record["seed"]
