"""KL divergence of a policy from the frozen LM, estimated from what the policy sampled."""

import datasets
import evaluate

from eval.stats import sampled_kl

DESCRIPTION = """
How far a policy is from the LM: the KL divergence KL(policy || LM) in nats, estimated from the log-probabilities of
the tokens that the policy sampled, as engines report them. It needs neither model; if both are at hand,
`eval.likelihood.likelihood` gives the divergence exactly at each position.
"""

INPUTS = """
Args:
    predictions: for every response a list of its tokens' log-probabilities under the policy, as it sampled them (its
        temperature and gate included). Greedy responses are no samples, and give no divergence.
    references: the same tokens' log-probabilities under the LM.

Returns:
    kl_to_lm: nats per token, over all tokens; an estimate, so it may fall below 0 if the two are close.
    ci95: its 95 % bootstrap interval over the responses, [low, high]; None for one response.
    kl_per_response: nats per response, that is between the distributions of whole responses.
    kl_per_response_ci95: its interval.

Examples:
    >>> metric = evaluate.load("eval/metrics/kl_to_lm")
    >>> result = metric.compute(predictions=[[-0.5, -1.0], [-0.25]], references=[[-1.0, -2.0], [-0.25]])
    >>> result["kl_to_lm"], result["kl_per_response"]
    (0.5, 0.75)
"""

CITATION = """
@article{kullback1951information,
  author = {Kullback, Solomon and Leibler, Richard A.},
  title = {On Information and Sufficiency},
  journal = {The Annals of Mathematical Statistics},
  volume = {22}, number = {1}, pages = {79--86}, year = {1951}
}
"""


class KlToLm(evaluate.Metric):
    def _info(self):
        logprobs = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            inputs_description=INPUTS,
            citation=CITATION,
            features=datasets.Features({"predictions": logprobs, "references": logprobs}),
        )

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("kl_to_lm got no responses: give the log-probabilities of at least one.")
        kl = sampled_kl(predictions, references)
        return {
            "kl_to_lm": kl.per_token,
            "ci95": kl.per_token_ci95,
            "kl_per_response": kl.per_response,
            "kl_per_response_ci95": kl.per_response_ci95,
        }
