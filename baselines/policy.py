"""The contract of every compared method, and the one decoding path that all of them share.

A policy has `complete(prompts) -> Completions` and `parameters_report()`. `sft.py`, `best_of_n.py` and `proxy.py` have
one each. `ppo.py`, `rloo.py`, `grpo.py` and `dpo.py` train the LM. Each has `CONFIGS` and
`train(run_args, training_args, model_args) -> trainer`, and `training.load_trained` makes a policy of its folder.

All policies decode by one [`~trl_proxy.decoding.settings.DecodingSettings`] through `generate_batches`: the same
prompts give the same batches for every method. In bfloat16 a result depends on the rest of its batch, by more than
some methods differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from tqdm.auto import tqdm

from trl_proxy.decoding.hidden_states import execution_device
from trl_proxy.decoding.settings import DecodingSettings

# For `logits_to_keep`: the last position by its index. For the slice that `generate` takes by itself, torch on a CPU
# copies the weights of the head once per row of the batch.
LAST_POSITION = torch.tensor([-1])
Prompts = list  # of strings, or of conversations: lists of {"role": ..., "content": ...}


@dataclass(frozen=True)
class Completions:
    """What a policy answered, in the order of the prompts.

    Attributes:
        texts: one response per prompt, without special tokens.
        token_ids: its tokens, the EOS included if it was written.
        seconds: wall-clock time of everything the method needed (encoding, decoding, for best-of-n also scoring).
        lm_forwards: forwards of the LM, counted per row and while the row was unfinished: n tokens of plain decoding
            are n, whatever the batch. For best-of-n those of all samples.
        stats: what only some methods have: `reject_rate`, `accepted_rank_mean`.
        trace: of a proxy, for every token of every response its text and the texts that were rejected before it, as
            [`~trl_proxy.decoding.trace.trace_texts`] gives them.
        reward_calls: responses that a reward scored for the method to answer: n per prompt for best-of-n.
    """

    texts: list[str]
    token_ids: list[list[int]]
    seconds: float
    lm_forwards: int
    stats: dict[str, float | None] = field(default_factory=dict)
    trace: list[list[tuple[str, list[str]]]] | None = None
    reward_calls: int = 0


class Policy(Protocol):
    """Anything that answers prompts."""

    def complete(self, prompts: Prompts) -> Completions: ...

    def parameters_report(self) -> dict[str, int]:
        """`trainable_parameters`, those that training changes, and `total_parameters`: of 4-bit weights as many as
        they stand for."""
        ...


class DecodingPolicy:
    """What a policy that decodes is made of.

    Args:
        decoding: how the model is decoded; by default as model and tokenizer say, up to `max_new_tokens`.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        batch_size: int,
        max_new_tokens: int | None = None,
        decoding: DecodingSettings | None = None,
    ):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.decoding = decoding or DecodingSettings.of(model, tokenizer, max_new_tokens=max_new_tokens)


def generate_batches(
    model, decoding: DecodingSettings, prompts: Prompts, *, batch_size: int, desc: str, **method
) -> Iterator[tuple[list[int], list[list[int]], object]]:
    """Decodes the prompts batch by batch; `method` are options of `generate` by which the method chooses tokens.

    Yields:
        the prompts' indices, their responses' token ids (cut after their end), and what `generate` returned.
    """
    batches = list(decoding.batches(prompts, batch_size=batch_size, device=execution_device(model)))
    for indices, inputs in tqdm(batches, desc=desc, unit="batch", leave=False):
        token_ids, _, output = decoding.generate(model, inputs, **method)
        yield indices, token_ids, output


def in_order(batches: list[tuple[list[int], list[list[int]]]]) -> list[list[int]]:
    """Token ids of all batches, back in the order of the prompts."""
    by_index = {i: ids for indices, rows in batches for i, ids in zip(indices, rows, strict=True)}
    return [by_index[i] for i in range(len(by_index))]


def decode_texts(tokenizer, token_ids: list[list[int]]) -> list[str]:
    """The responses as text, as TRL's trainers hand them to a reward."""
    return tokenizer.batch_decode(token_ids, skip_special_tokens=True)
