"""Win rate against another policy, at equal length of the responses."""

import datasets
import evaluate

from eval.length_control import length_controlled_win_rate
from eval.stats import win_rate, win_scores

DESCRIPTION = """
The win rate if both responses of every pair were equally long, and the plain one. As in AlpacaEval 2, with the length
term alone: a logistic regression of the win on the difference in length, evaluated at 0.
"""

INPUTS = """
Args:
    predictions: one score per prompt, by a reward or a judge.
    references: the other policy's scores, in the same order of prompts.
    prediction_lengths, reference_lengths: of the scored responses, all in one unit (characters, tokens).

Returns:
    length_controlled_win_rate: the rate at equal length; None for fewer than three pairs, or if all pairs differ by
        the same length.
    ci95: its 95 % interval, [low, high], finite even if length separates wins from losses; None if the rate is.
    length_effect: log-odds of a win per unit of tanh(difference / standard deviation); above 0 if longer wins.
    win_rate: the plain one.

Examples:
    >>> metric = evaluate.load("eval/metrics/length_controlled_win_rate")
    >>> result = metric.compute(
    ...     predictions=[1, 1, 1, 1, 0, 0],  # the longer response wins, whoever wrote it
    ...     references=[0, 0, 0, 0, 1, 1],
    ...     prediction_lengths=[90, 80, 60, 45, 20, 35],
    ...     reference_lengths=[40, 40, 40, 40, 40, 40],
    ... )
    >>> round(result["win_rate"], 2), round(result["length_controlled_win_rate"], 2)
    (0.67, 0.46)
"""

CITATION = """
@article{dubois2024length,
  author = {Dubois, Yann and Galambosi, Bal{\\'a}zs and Liang, Percy and Hashimoto, Tatsunori B.},
  title = {Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators},
  journal = {arXiv preprint arXiv:2404.04475}, year = {2024}
}
"""


class LengthControlledWinRate(evaluate.Metric):
    def _info(self):
        columns = ("predictions", "references", "prediction_lengths", "reference_lengths")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            inputs_description=INPUTS,
            citation=CITATION,
            features=datasets.Features({name: datasets.Value("float64") for name in columns}),
        )

    def _compute(self, predictions, references, prediction_lengths, reference_lengths):
        if not predictions:
            raise ValueError(
                "length_controlled_win_rate got no pairs of scores: give at least one prediction and its reference."
            )
        wins = win_scores(predictions, references)
        result = length_controlled_win_rate(wins, prediction_lengths, reference_lengths)
        return {
            "length_controlled_win_rate": None if result is None else result.rate,
            "ci95": None if result is None else result.ci95,
            "length_effect": None if result is None else result.length_effect,
            "win_rate": win_rate(predictions, references).rate,
        }
