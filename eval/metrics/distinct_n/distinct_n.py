"""Diversity of texts: the share of their n-grams that are distinct."""

import datasets
import evaluate

from eval.stats import distinct_n

DESCRIPTION = """
Distinct n-grams of lower-cased words over all n-grams, all texts together. Near 0 if a policy has one answer to
everything. It falls as texts grow longer and more numerous: compare equal numbers of prompts and similar lengths.
"""

INPUTS = """
Args:
    predictions: the texts.
    n: words per n-gram, at least 1.

Returns:
    distinct_n: between 0 and 1; None if no text has n words.

Examples:
    >>> metric = evaluate.load("eval/metrics/distinct_n")
    >>> metric.compute(predictions=["a b a b"], n=1)
    {'distinct_n': 0.5}
"""

CITATION = """
@inproceedings{li2016diversity,
  author = {Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  title = {A Diversity-Promoting Objective Function for Neural Conversation Models},
  booktitle = {Proceedings of NAACL-HLT 2016}, pages = {110--119}, year = {2016}, note = {arXiv:1510.03055}
}
"""


class DistinctN(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            inputs_description=INPUTS,
            citation=CITATION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, n=2):
        if not predictions:
            raise ValueError("distinct_n got no texts: give at least one prediction.")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}: it is the number of words of an n-gram.")
        return {"distinct_n": distinct_n(predictions, n)}
