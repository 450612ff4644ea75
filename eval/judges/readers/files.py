"""The types of the files that blind readings are kept in, and how one is read."""

import json
from pathlib import Path
from typing import TypedDict

from trl_proxy.core.values import type_flaw


class ItemInFile(TypedDict):
    """[`eval.judges.readers.pairs.Item`]."""

    id: str
    duels: list[tuple[str, str]]
    prompt: int
    first_side: str


class SheetInFile(TypedDict):
    """[`eval.judges.readers.pairs.Sheet`]."""

    id: str
    reader: int
    sitting: int
    sittings: int
    items: list[ItemInFile]


class KeyInFile(TypedDict):
    """`key.json`."""

    settings: dict
    records: dict[str, str]
    duels: list[tuple[str, str]]
    sheets: list[SheetInFile]


class RatesInFile(TypedDict):
    """[`eval.judges.readers.counts.rates`]."""

    n_pairs: int
    wins: int
    losses: int
    ties: int
    win_rate: float | None
    ci95: tuple[float, float] | None
    tie_rate: float | None


class AgreementInFile(TypedDict):
    """[`eval.judges.readers.counts.agreement`]."""

    pairs: int
    share: float | None
    kappa: float | None
    alpha: float | None


class DuelInFile(RatesInFile):
    """[`eval.judges.readers.counts.duel_result`]."""

    first: str
    second: str
    title: str
    identical: int
    unread: int
    readings: int
    scores: list[float | None]
    by_kind: dict[str, RatesInFile]
    agreement: AgreementInFile


class ResultsInFile(TypedDict):
    """`results.json`."""

    records: dict[str, str]
    titles: dict[str, str]
    duels: list[DuelInFile]
    labels: dict[str, dict[str, dict[str, float]] | None]


def read_checked(path: Path, kind: type, redo: str) -> dict:
    """The content of a JSON file.

    Args:
        kind: one of the types above.
        redo: what to do about a damaged file, as the sentence ends.

    Raises:
        ValueError: if it is no JSON, or not of this type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): {redo}.") from None
    if flaw := type_flaw(content, kind, "it"):
        raise ValueError(f"{path} is damaged ({flaw}): {redo}.")
    return content
