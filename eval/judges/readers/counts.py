"""What readings say: wins, ties, labels and agreement. Pure functions of readings and records."""

from collections import Counter, defaultdict

import numpy as np
from statsmodels.stats.inter_rater import cohens_kappa

from eval.judges.readers.pairs import Duel, differing
from eval.judges.readers.verdicts import LABELS, Reading
from eval.stats import rate_ci

SCORES = {"first": 1.0, "tie": 0.5, "second": 0.0}
WINNERS = tuple(SCORES)


def settle(winners: list[str]) -> str:
    """What more than half of a pair's readers say; else it is a tie, as with two who differ."""
    winner, votes = Counter(winners).most_common(1)[0]
    return winner if 2 * votes > len(winners) else "tie"


def rates(scores: list[float | None]) -> dict:
    """Counts and rates of one duel's pairs: 1 if the first won, 0.5 for a tie, 0 if the second won, None if unread.

    The win rate is of the decided pairs, the tie rate of all pairs with a verdict.
    """
    wins, losses, ties = (scores.count(score) for score in (1.0, 0.0, 0.5))
    decided, judged = wins + losses, wins + losses + ties
    return {
        "n_pairs": judged,
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "win_rate": wins / decided if decided else None,
        "ci95": rate_ci(wins, decided),
        "tie_rate": ties / judged if judged else None,
    }


def label_counts(readings: list[Reading], name: str, kinds: list[str] | None) -> dict[str, dict[str, float]] | None:
    """Kind of prompt -> label -> how many responses of a record have it; `all` for all kinds. None if nobody read any.

    A response counts once, in equal parts for each time that it was read.
    """
    given: dict[int, list[str]] = defaultdict(list)
    for reading in readings:
        # Two duels that share their texts share a reading, too: the record is on one of the sides of either.
        for side, label in enumerate(reading.labels):
            if any(duel[side] == name for duel in reading.item.duels):
                given[reading.item.prompt].append(label)
    if not given:
        return None
    counts = {kind: dict.fromkeys(LABELS, 0.0) for kind in ["all", *sorted(set(kinds or []))]}
    for prompt, labels in given.items():
        for label, times in Counter(labels).items():
            for kind in ["all"] + ([kinds[prompt]] if kinds else []):
                counts[kind][label] += times / len(labels)
    return counts


def agreement(votes: dict[str, dict[int, str]]) -> dict:
    """How far readers agree on the pairs that two or more of them read.

    Args:
        votes: pair -> reader -> its winner.

    Returns:
        `pairs`; `share`: of them on which all readers agree; `kappa`: Cohen's, if two readers share all of them;
        `alpha`: Krippendorff's, nominal. A measure that is not defined, because there are no such pairs or all their
        verdicts are the same, is None.
    """
    shared = {pair: of for pair, of in votes.items() if len(of) > 1}
    same = sum(len(set(of.values())) == 1 for of in shared.values())
    found = {"pairs": len(shared), "share": same / len(shared) if shared else None, "kappa": None, "alpha": None}
    readers = {reader for of in shared.values() for reader in of}
    if len({winner for of in shared.values() for winner in of.values()}) > 1:
        if len(readers) == 2:
            found["kappa"] = _kappa([[of[reader] for reader in sorted(readers)] for of in shared.values()])
        found["alpha"] = _alpha(shared)
    return found


def _kappa(rows: list[list[str]]) -> float:
    table = np.zeros((len(WINNERS), len(WINNERS)))
    for row in rows:
        table[tuple(WINNERS.index(winner) for winner in row)] += 1
    return float(cohens_kappa(table, return_results=False))


def _alpha(votes: dict[str, dict[int, str]]) -> float | None:
    """Krippendorff's alpha; None without nltk, which the extra `readers` installs."""
    try:
        from nltk.metrics.agreement import AnnotationTask  # takes seconds
    except ImportError:
        return None
    rows = [(str(reader), pair, winner) for pair, of in votes.items() for reader, winner in of.items()]
    return float(AnnotationTask(data=rows).alpha())


def duel_result(duel: Duel, readings: list[Reading]) -> dict:
    """What readers say of two records. Its keys:

    `first`, `second` (file names of the records), `title`, `identical` (prompts with the same response twice),
    `unread` (pairs without a verdict), `readings` (their number), `scores` (by prompt, as for [`rates`]), the keys of
    [`rates`], `by_kind` (kind -> [`rates`]), and `agreement`.
    """
    mine = [reading for reading in readings if duel.names in map(tuple, reading.item.duels)]
    votes: dict[int, dict[int, str]] = defaultdict(dict)
    for reading in mine:
        votes[reading.item.prompt][reading.reader] = reading.winner
    different, n = set(differing(duel)), duel.first["n_prompts"]
    scores: list[float | None] = [None if i in different else 0.5 for i in range(n)]
    for prompt, of in votes.items():
        scores[prompt] = SCORES[settle(list(of.values()))]
    kinds = duel.first["kinds"]
    by_kind = {
        kind: rates([score for score, k in zip(scores, kinds, strict=True) if k == kind])
        for kind in sorted(set(kinds or []))
    }
    return {
        "first": duel.names[0],
        "second": duel.names[1],
        "title": duel.title,
        "identical": n - len(different),
        "unread": len(different) - len(votes),
        "readings": len(mine),
        "scores": scores,
        **rates(scores),
        "by_kind": by_kind,
        "agreement": agreement({str(prompt): of for prompt, of in votes.items()}),
    }
