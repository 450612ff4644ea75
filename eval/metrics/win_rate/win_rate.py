"""Win rate of scores against the scores of another policy on the same prompts."""

import datasets
import evaluate

from eval.stats import sign_test, win_rate

DESCRIPTION = """
Share of the prompts on which a policy's score is above another policy's, a tie counting half, with its Wilson interval
and the exact sign test (McNemar's, for outcomes of 0 and 1).
"""

INPUTS = """
Args:
    predictions: one score per prompt, by a reward or a judge.
    references: the other policy's scores, in the same order of prompts.

Returns:
    win_rate: wins plus half of the ties, over all pairs.
    ci95: its 95 % Wilson interval, [low, high].
    tie_rate: ties over all pairs.
    p_value: two-sided, of wins and losses being equally likely; ties are left out.

Examples:
    >>> metric = evaluate.load("eval/metrics/win_rate")
    >>> result = metric.compute(predictions=[1.0, 2.0, 3.0, 4.0], references=[0.0, 2.0, 5.0, 4.0])
    >>> result["win_rate"], result["tie_rate"], result["p_value"]
    (0.5, 0.5, 1.0)
"""

CITATION = """
@article{wilson1927probable,
  author = {Wilson, Edwin B.},
  title = {Probable Inference, the Law of Succession, and Statistical Inference},
  journal = {Journal of the American Statistical Association},
  volume = {22}, number = {158}, pages = {209--212}, year = {1927}
}
"""


class WinRate(evaluate.Metric):
    def _info(self):
        score = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            inputs_description=INPUTS,
            citation=CITATION,
            features=datasets.Features({"predictions": score, "references": score}),
        )

    def _compute(self, predictions, references):
        wins = win_rate(predictions, references)
        if wins is None:
            raise ValueError("win_rate got no pairs of scores: give at least one prediction and its reference.")
        p_value = sign_test(predictions, references)
        return {"win_rate": wins.rate, "ci95": wins.ci95, "tie_rate": wins.tie_rate, "p_value": p_value}
