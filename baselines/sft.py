"""SFT, the plain LM decoded greedily: what every method is compared with. Nothing is fine-tuned here."""

import time

from baselines.policy import (
    LAST_POSITION,
    Completions,
    DecodingPolicy,
    Prompts,
    decode_texts,
    generate_batches,
    in_order,
)


class GreedyPolicy(DecodingPolicy):
    """Greedy decoding of a causal LM.

    Args:
        model: the plain LM. If a proxy wraps it, this object is still the wrapped LM itself, so the responses are
            those of `with proxy_model.disable_proxy()`.
        kwargs: as for [`~baselines.policy.DecodingPolicy`].
    """

    def parameters_report(self) -> dict[str, int]:
        """Nothing is trained; how many parameters the LM has."""
        return {"trainable_parameters": 0, "total_parameters": self.model.num_parameters()}

    def complete(self, prompts: Prompts) -> Completions:
        """The LM's most probable continuation, token by token."""
        start = time.perf_counter()
        batches = [
            (indices, token_ids)
            for indices, token_ids, _ in generate_batches(
                self.model,
                self.decoding,
                prompts,
                batch_size=self.batch_size,
                desc="sft",
                do_sample=False,
                logits_to_keep=LAST_POSITION,
            )
        ]
        token_ids = in_order(batches)
        texts = decode_texts(self.tokenizer, token_ids)
        return Completions(texts, token_ids, time.perf_counter() - start, sum(map(len, token_ids)))
