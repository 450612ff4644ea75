"""The contract of every compared method, and the one decoding path that all of them share.

A policy has `complete(prompts) -> Completions` and `parameters_report()`. `sft.py`, `best_of_n.py` and `proxy.py` have
one each. `ppo.py`, `rloo.py`, `grpo.py` and `dpo.py` train the LM. Each has `CONFIGS` and
`train(run_args, training_args, model_args) -> trainer`, and `training.load_trained` makes a policy of its folder.

All policies decode through `generate_batches`: the same prompts give the same batches for every method. In bfloat16 a
result depends on the rest of its batch, by more than some methods differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from tqdm.auto import tqdm
from trl import is_conversational

from trl_proxy.prompts import check_chat_template, length_buckets

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


def encode_prompts(prompts: Prompts, tokenizer) -> list[list[int]]:
    """Token ids of every prompt, unpadded, exactly as TRL's trainers encode them: conversations through the chat
    template with the generation prompt, strings as they are. `ValueError` if the tokenizer has no template."""
    check_chat_template(prompts[0], tokenizer)
    if is_conversational({"prompt": prompts[0]}):
        return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer(prompts)["input_ids"]


def stop_ids(model, tokenizer) -> list[int]:
    """Ids that end a response: the tokenizer's EOS and those of the model's generation config."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def pad_id(model, tokenizer) -> int:
    """Id that fills up a batch: the tokenizer's, or an id that ends a response if it has none."""
    return stop_ids(model, tokenizer)[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def cut_at_stop(tokens: list[int], stops: list[int]) -> list[int]:
    """The tokens up to and including the first stop id: what follows it is padding."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return tokens[: end + 1]


def prompt_batches(
    model, tokenizer, prompts: Prompts, *, batch_size: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """The prompts' indices and tensors, batch by batch: sorted by length, longest first, padded on the left."""
    encoded = encode_prompts(prompts, tokenizer)
    pad = pad_id(model, tokenizer)
    for indices in length_buckets([len(ids) for ids in encoded], batch_size):
        width = len(encoded[indices[0]])
        input_ids = torch.full((len(indices), width), pad)
        attention_mask = torch.zeros_like(input_ids)
        for row, i in enumerate(indices):
            start = width - len(encoded[i])
            input_ids[row, start:] = torch.tensor(encoded[i])
            attention_mask[row, start:] = 1
        yield indices, {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}


def generate(model, tokenizer, inputs: dict[str, torch.Tensor], **generate_kwargs) -> tuple[list[list[int]], object]:
    """The responses' token ids, cut after the EOS, and what `model.generate` returned."""
    stops = stop_ids(model, tokenizer)
    output = model.generate(
        **inputs,
        eos_token_id=stops,
        pad_token_id=pad_id(model, tokenizer),
        return_dict_in_generate=True,
        **generate_kwargs,
    )
    width = inputs["input_ids"].shape[1]
    return [cut_at_stop(row, stops) for row in output.sequences[:, width:].tolist()], output


def generate_batches(
    model, tokenizer, prompts: Prompts, *, batch_size: int, desc: str, **generate_kwargs
) -> Iterator[tuple[list[int], list[list[int]], object]]:
    """Decodes the prompts batch by batch.

    Yields:
        the prompts' indices, their responses' token ids (cut after the EOS), and what `generate` returned.
    """
    batches = list(prompt_batches(model, tokenizer, prompts, batch_size=batch_size))
    for indices, inputs in tqdm(batches, desc=desc, unit="batch", leave=False):
        yield indices, *generate(model, tokenizer, inputs, **generate_kwargs)


def in_order(batches: list[tuple[list[int], list[list[int]]]]) -> list[list[int]]:
    """Token ids of all batches, back in the order of the prompts."""
    by_index = {i: ids for indices, rows in batches for i, ids in zip(indices, rows, strict=True)}
    return [by_index[i] for i in range(len(by_index))]


def decode_texts(tokenizer, token_ids: list[list[int]]) -> list[str]:
    """The responses as text, as TRL's trainers hand them to a reward."""
    return tokenizer.batch_decode(token_ids, skip_special_tokens=True)
