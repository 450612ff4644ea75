"""The table of judgements, from what some judgements lack."""

from eval.judges.judgements import judgement_table


def judgement(method: str, seed: int, verdicts: list[float], **values) -> dict:
    rate = sum(verdicts) / len(verdicts)
    return {
        **{"judge": "reward", "method": method, "variant": None, "seed": seed, "verdicts": verdicts},
        **{"win_rate": rate, "ci95": [0.0, 1.0], "tie_rate": 0.0, "disagreement_rate": None, "unparsed": 0},
        **{"by_kind": {}, "prompt_tokens": None, "completion_tokens": None, "cost": None, **values},
    }


def test_seeds_whose_verdicts_have_no_interval():
    """Each seed loses what the other wins: nothing is known about the spread."""
    pair = [judgement("proxy", 0, [0.0, 1.0]), judgement("proxy", 1, [1.0, 0.0])]
    headers, rows = judgement_table([*pair, judgement("dpo", 0, [0.5])])
    cells = {row[1]: dict(zip(headers, row, strict=True)) for row in rows}
    assert cells["proxy"]["win rate"] == "0.50"
    assert cells["dpo"]["win rate"] == "0.50 [0.00, 1.00]"
