"""How the rewards of a policy's responses are distributed over the prompts."""

import datasets
import evaluate
import numpy as np

from eval.stats import mean_ci

DESCRIPTION = """
Mean, spread and quantiles of the rewards over the prompts. A mean can rise because all responses became a little
better or because a few became much better: the quantiles tell.
"""

INPUTS = """
Args:
    predictions: one reward per prompt.
    quantiles: the ones wanted, each between 0 and 1.

Returns:
    n: number of prompts.
    mean: of the rewards.
    ci95: its 95 % bootstrap interval (BCa) over the prompts, [low, high]; None for one prompt.
    std: standard deviation between prompts (of a sample, n - 1); None for one prompt.
    min, max: the worst and the best reward.
    quantiles: their values by name, linear between neighbours.

Examples:
    >>> metric = evaluate.load("eval/metrics/reward_distribution")
    >>> result = metric.compute(predictions=[1.0, 2.0, 3.0, 4.0], quantiles=[0.25, 0.5])
    >>> result["mean"], result["quantiles"]
    (2.5, {'0.25': 1.75, '0.5': 2.5})
"""

CITATION = """
@article{efron1987better,
  author = {Efron, Bradley},
  title = {Better Bootstrap Confidence Intervals},
  journal = {Journal of the American Statistical Association},
  volume = {82}, number = {397}, pages = {171--185}, year = {1987}
}
"""


class RewardDistribution(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            inputs_description=INPUTS,
            citation=CITATION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions, quantiles=(0.05, 0.25, 0.5, 0.75, 0.95)):
        if not predictions:
            raise ValueError("reward_distribution got no rewards: give at least one prediction.")
        if outside := [q for q in quantiles if not 0 <= q <= 1]:
            raise ValueError(f"quantiles must lie between 0 and 1, got {outside[0]}.")
        interval = mean_ci(predictions)  # raises if a reward is not a number
        return {
            "n": len(predictions),
            "mean": float(np.mean(predictions)),
            "ci95": interval,
            "std": float(np.std(predictions, ddof=1)) if len(predictions) > 1 else None,
            "min": min(predictions),
            "max": max(predictions),
            "quantiles": {str(q): float(np.quantile(predictions, q)) for q in quantiles},
        }
