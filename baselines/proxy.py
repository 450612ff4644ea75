"""The proxy as a policy of the comparison."""

import time
from collections import Counter

import torch

from baselines.policy import (
    Completions,
    DecodingPolicy,
    Prompts,
    decode_texts,
    generate_batches,
    in_order,
)
from trl_proxy.decoding.trace import trace, trace_texts


class ProxyPolicy(DecodingPolicy):
    """A trained proxy over its frozen LM.

    Args:
        model: a [`~trl_proxy.ProxyModelForCausalLM`].
        gate_sample: draw the decisions instead of taking the likelier one. The paper decides greedily at test time.
        seed: of the drawn decisions.
        kwargs: as for [`~baselines.policy.DecodingPolicy`].
    """

    def __init__(self, model, tokenizer, *, gate_sample: bool = False, seed: int = 0, **kwargs):
        super().__init__(model, tokenizer, **kwargs)
        self.gate_sample, self.seed = gate_sample, seed

    def parameters_report(self) -> dict[str, int]:
        """Number of the gate's and the critic's parameters, and of all parameters including the LM's."""
        trainable, total = self.model.get_nb_trainable_parameters()
        return {"trainable_parameters": trainable, "total_parameters": total}

    def complete(self, prompts: Prompts) -> Completions:
        """Gated responses; `stats` has `reject_rate` (the share of decided proposals that were rejected) and
        `accepted_rank_mean` (rejections before the accepted token, per token)."""
        torch.manual_seed(self.seed)
        start = time.perf_counter()
        batches, rollouts, totals = [], [], Counter()
        for indices, token_ids, output in generate_batches(
            self.model,
            self.decoding,
            prompts,
            batch_size=self.batch_size,
            desc="proxy",
            gate_sample=self.gate_sample,
            output_rollout=True,
        ):
            batches.append((indices, token_ids))
            # The hidden states are large and not needed here.
            rollouts.append((indices, output.rollout._replace(hidden=None)))
            totals.update({name: int(per_row.sum()) for name, per_row in output.decisions._asdict().items()})
        token_ids = in_order(batches)
        texts = decode_texts(self.tokenizer, token_ids)
        decided = totals["proposals"] - totals["forced"]
        stats = {
            "reject_rate": totals["rank_sum"] / decided if decided else None,
            "accepted_rank_mean": totals["rank_sum"] / totals["tokens"],
        }
        seconds = time.perf_counter() - start
        traced = [(indices, trace(rollout, [token_ids[i] for i in indices])) for indices, rollout in rollouts]
        texts_of_traces = [trace_texts(response, self.tokenizer) for response in in_order(traced)]
        return Completions(texts, token_ids, seconds, totals["lm_forwards"], stats, texts_of_traces)
