"""Best-of-n: sample n responses, answer with the one that the reward likes best (Stiennon et al. 2020, 2009.01325).

The strongest baseline per response and the most expensive: every answer takes n times the LM's forwards.
"""

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from baselines.policy import (
    LAST_POSITION,
    Completions,
    Prompts,
    decode_texts,
    in_order,
)
from baselines.sft import GreedyPolicy
from trl_proxy.decoding.hidden_states import execution_device
from trl_proxy.decoding.prefix_cache import prefill
from trl_proxy.decoding.settings import TRUNCATIONS
from trl_proxy.rewards.caller import as_caller


@dataclass(frozen=True)
class Samples:
    """`n` samples of every prompt, sample by sample (the outer list is over samples, the inner one over prompts).

    `seconds` is a sample's decoding and scoring time over all prompts; the first k add up to the time of best-of-k.
    The prompts are read once, in the first sample's time.
    """

    texts: list[list[str]]
    token_ids: list[list[list[int]]]
    rewards: list[list[float]]
    seconds: list[float]


def best_of(samples: Samples, n: int) -> Completions:
    """The best of each prompt's first `n` samples, the earlier one if two are equal.

    Raises:
        ValueError: if fewer than `n` samples were drawn.
    """
    if not 1 <= n <= len(samples.texts):
        raise ValueError(f"n must lie between 1 and the {len(samples.texts)} samples that were drawn, got {n}.")
    best = np.argmax(samples.rewards[:n], axis=0)  # (prompts,)
    return Completions(
        texts=[samples.texts[k][i] for i, k in enumerate(best)],
        token_ids=[samples.token_ids[k][i] for i, k in enumerate(best)],
        seconds=sum(samples.seconds[:n]),
        lm_forwards=sum(len(ids) for sample in samples.token_ids[:n] for ids in sample),
        reward_calls=n * len(best),
    )


class BestOfNPolicy(GreedyPolicy):
    """The reward's choice among `n` samples of the LM's full distribution, after the penalties and bans of `decoding`.

    Args:
        model: the plain LM.
        reward: in TRL's calling convention, or a [`~trl_proxy.rewards.RewardCaller`].
        n: samples per prompt.
        temperature, top_p: of the sampling; no other truncation, whatever the model's generation config says.
        seed: sample `k` depends on `seed` and `k` alone: the samples of a smaller `n` are the first of a larger one's.
        kwargs: as for [`~baselines.policy.DecodingPolicy`].
    """

    def __init__(
        self,
        model,
        tokenizer,
        reward,
        *,
        n: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(model, tokenizer, **kwargs)
        self.reward, self.n = reward, n
        self.temperature, self.top_p, self.seed = temperature, top_p, seed

    def sample(self, prompts: Prompts, /, **columns) -> Samples:
        """Draws and scores `n` samples; `columns` are handed to the reward."""
        start = time.perf_counter()
        batches = list(self.decoding.batches(prompts, batch_size=self.batch_size, device=execution_device(self.model)))
        # The LM's whole distribution but for `top_p`: `generate` would keep 50 tokens, or what the LM's files say.
        method = dict.fromkeys(TRUNCATIONS) | {"top_k": 0, "top_p": self.top_p, "temperature": self.temperature}
        method |= {"do_sample": True, "logits_to_keep": LAST_POSITION}
        sampled, seconds = [[] for _ in range(self.n)], [0.0] * self.n
        bar = tqdm(total=self.n * len(batches), desc=f"best of {self.n}", unit="batch", leave=False)
        for number, (indices, inputs) in enumerate(batches):
            with torch.no_grad():
                cache = None if self.decoding.has_own_cache else prefill(self.model, **inputs)
            for k in range(self.n):
                torch.manual_seed(int(np.random.SeedSequence((self.seed, k, number)).generate_state(1)[0]))
                token_ids, *_ = self.decoding.generate(
                    self.model, inputs, past_key_values=copy.deepcopy(cache), **method
                )
                sampled[k].append((indices, token_ids))
                start, spent = time.perf_counter(), time.perf_counter() - start
                seconds[k] += spent  # the first sample's include reading the prompts
                bar.update()
        bar.close()
        samples, reward = Samples([], [], [], []), as_caller(self.reward)
        for k in range(self.n):
            start = time.perf_counter()
            token_ids = in_order(sampled[k])
            texts = decode_texts(self.tokenizer, token_ids)
            samples.texts.append(texts)
            samples.token_ids.append(token_ids)
            samples.rewards.append(reward.score(prompts, texts, token_ids, columns))
            samples.seconds.append(seconds[k] + time.perf_counter() - start)
        return samples

    def complete(self, prompts: Prompts) -> Completions:
        """The best of `n` samples of every prompt."""
        return best_of(self.sample(prompts), self.n)
