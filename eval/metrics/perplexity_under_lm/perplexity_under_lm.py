"""Perplexity of responses under a causal LM, given their prompts."""

import math

import datasets
import evaluate

from eval.likelihood import likelihood
from eval.stats import ratio_ci
from trl_proxy.decoding.settings import encode_prompts
from trl_proxy.devices import best_device
from trl_proxy.loading import load_lm

DESCRIPTION = """
How surprising responses are to a language model: the exponential of the mean negative log-likelihood per token. It is
low for text that the LM itself would write, and high for a policy that left the LM's language behind.
"""

INPUTS = """
Args:
    predictions: the responses. An EOS after them is not counted: a text does not tell whether its end was written.
    model: `embedded`, a folder or a hub id of a causal LM.
    prompts: one per response, all strings or all conversations (lists of messages, for the LM's chat template).
        Without prompts the first token of every text, a BOS if the tokenizer writes one, takes the prompt's place.
    batch_size: texts per forward.

Returns:
    perplexity: over all tokens of all texts.
    ci95: its 95 % bootstrap interval over the texts, [low, high]; None for one text.
    lm_logprob_per_token: the mean log-likelihood, nats per token: minus the perplexity's logarithm.
    perplexities: one per text; None for a text without tokens to predict.

Examples:
    >>> metric = evaluate.load("eval/metrics/perplexity_under_lm")
    >>> result = metric.compute(
    ...     predictions=["The capital of France is Paris.", "Purple of seven quickly is."], model="embedded"
    ... )
    >>> result["perplexities"][0] < result["perplexities"][1]
    True
"""

CITATION = """
@article{jelinek1977perplexity,
  author = {Jelinek, Fred and Mercer, Robert L. and Bahl, Lalit R. and Baker, James K.},
  title = {Perplexity: a measure of the difficulty of speech recognition tasks},
  journal = {The Journal of the Acoustical Society of America},
  volume = {62}, number = {S1}, pages = {S63}, year = {1977}
}
"""


class PerplexityUnderLm(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            inputs_description=INPUTS,
            citation=CITATION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, prompts=None, batch_size=8):
        if not predictions:
            raise ValueError("perplexity_under_lm got no texts: give at least one prediction.")
        if prompts is not None and len(prompts) != len(predictions):
            raise ValueError(
                f"prompts has {len(prompts)} entries for {len(predictions)} predictions: give one prompt per text."
            )
        lm, tokenizer = load_lm(model, device=best_device())
        if prompts is None:
            texts = tokenizer(predictions)["input_ids"]
            prompt_ids, response_ids = [ids[:1] for ids in texts], [ids[1:] for ids in texts]
        else:
            prompt_ids = encode_prompts(prompts, tokenizer)
            response_ids = tokenizer(predictions, add_special_tokens=False)["input_ids"]
        rows = [i for i, ids in enumerate(response_ids) if ids]
        if not rows:
            raise ValueError("predictions has no text with a token to predict: give longer texts, or their prompts.")
        if empty := [i for i in rows if not prompt_ids[i]]:
            raise ValueError(f"prompts[{empty[0]}] has no tokens: give text before the first predicted token.")
        lm.to(best_device())
        pick = [prompt_ids[i] for i in rows], [response_ids[i] for i in rows]
        logprobs, _ = likelihood(lm, *pick, batch_size=batch_size)
        counts = [len(response_ids[i]) for i in rows]
        mean, interval = math.fsum(logprobs) / sum(counts), ratio_ci([-total for total in logprobs], counts)
        by_row = {i: math.exp(-total / n) for i, total, n in zip(rows, logprobs, counts, strict=True)}
        return {
            "perplexity": math.exp(-mean),
            "ci95": None if interval is None else [math.exp(end) for end in interval],
            "lm_logprob_per_token": mean,
            "perplexities": [by_row.get(i) for i in range(len(predictions))],
        }
