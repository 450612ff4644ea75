"""How likely responses and answers are under an LM, and how far a policy is from it: teacher-forced forwards."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from trl_proxy.decoding.hidden_states import execution_device
from trl_proxy.modeling.causal_lm import ProxyModelForCausalLM
from trl_proxy.prompts import length_buckets


def _teacher_forced(
    prompt_ids: list[list[int]], response_ids: list[list[int]], batch_size: int, device
) -> Iterator[tuple[list[int], dict[str, torch.Tensor], torch.Tensor]]:
    """Prompts and responses joined, in batches of similar length, padded on the right (positions need no shift).

    Yields:
        indices of the rows, the LM's inputs, and the bool mask `(rows, width)` of the response's tokens.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True)]
    for indices in tqdm(length_buckets(lengths, batch_size), desc="likelihood", unit="batch", leave=False):
        input_ids = torch.zeros(len(indices), lengths[indices[0]], dtype=torch.long)
        attention_mask, is_response = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
        for row, i in enumerate(indices):
            input_ids[row, : lengths[i]] = torch.tensor(prompt_ids[i] + response_ids[i])
            attention_mask[row, : lengths[i]] = 1
            is_response[row, len(prompt_ids[i]) : lengths[i]] = True
        inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device), "use_cache": False}
        yield indices, inputs, is_response.to(device)


def _response_logprobs(
    model, inputs: dict, is_response: torch.Tensor, names: tuple[str, ...] = ("logits",), **options
) -> list[torch.Tensor]:
    """Log-softmax `(response tokens, vocab)` of each named output, in float32, at the positions that predict the
    response's tokens. Position t predicts token t + 1. No logits are computed before the first response token of any
    row, because the vocabulary is large."""
    if not is_response.any():
        return [torch.zeros(0, model.config.get_text_config().vocab_size, device=is_response.device)] * len(names)
    first = int(is_response.any(0).int().argmax())
    # Indices, not a number: they gather a contiguous tensor; for a slice the head is several times slower on a CPU.
    keep = torch.arange(first - 1, is_response.shape[1] - 1, device=is_response.device)
    output = model(**inputs, logits_to_keep=keep, **options)
    return [F.log_softmax(output[name][is_response[:, first:]].float(), dim=-1) for name in names]


@torch.inference_mode()
def likelihood(
    lm, prompt_ids: list[list[int]], response_ids: list[list[int]], *, policy_lm=None, batch_size: int = 8
) -> tuple[list[float], float | None]:
    """Log-probability of every response under the LM, and the policy's KL divergence from the LM.

    Both are teacher-forced, in nats, from a float32 log-softmax whatever the LM's dtype.

    Args:
        lm: a causal LM, the frozen one.
        prompt_ids: token ids of the prompts, n lists.
        response_ids: token ids of the responses, the EOS included if it was written, n lists.
        policy_lm: the causal LM that wrote them, e.g. a proxy with prefix features (its gated logits) or a fine-tuned
            LM; may be `lm` itself.

    Returns:
        n sums over the response's tokens, and the KL divergence of the two next-token distributions, exact at each of
        the responses' positions and averaged over them; None without `policy_lm`.

    Raises:
        ValueError: the LM's logits are NaN.
    """
    sums, divergence = [0.0] * len(prompt_ids), 0.0
    models = [lm] if policy_lm is None or policy_lm is lm else [lm, policy_lm]
    is_gate_on_lm = isinstance(policy_lm, ProxyModelForCausalLM) and policy_lm.get_base_model() is lm
    for indices, inputs, is_response in _teacher_forced(prompt_ids, response_ids, batch_size, execution_device(lm)):
        if is_gate_on_lm:  # one forward of the LM tells both
            both = ("lm_logits", "logits")
            logprobs = _response_logprobs(policy_lm, inputs, is_response, both, output_lm_logits=True)
        else:
            logprobs = [_response_logprobs(model, inputs, is_response)[0] for model in models]
        token_logprobs = torch.zeros(is_response.shape, device=is_response.device)
        token_logprobs[is_response] = logprobs[0].gather(-1, inputs["input_ids"][is_response][:, None])[:, 0]
        for i, total in zip(indices, token_logprobs.sum(-1).tolist(), strict=True):
            sums[i] = total
        if len(logprobs) > 1:
            logprobs[1].clamp_(min=torch.finfo(torch.float32).min)  # a gated -inf: 0 log 0 is 0, not NaN
            divergence += F.kl_div(*logprobs, log_target=True, reduction="sum").item()
    if any(map(math.isnan, sums)):
        raise ValueError(
            f"The LM's logits are NaN for {sum(map(math.isnan, sums))} of {len(sums)} responses: load it in float32 "
            "if it computes in float16, or look for damaged weights."
        )
    return sums, None if policy_lm is None else divergence / sum(map(len, response_ids))


@torch.inference_mode()
def next_token_logprobs(lm, prompt_ids: list[list[int]], token_ids: list[int], *, batch_size: int = 8) -> torch.Tensor:
    """Log-probabilities of given tokens right after each prompt, in nats, from a float32 log-softmax.

    Args:
        lm: a causal LM.
        prompt_ids: token ids of the prompts, n lists.
        token_ids: the k tokens.

    Returns:
        float32 tensor `(n, k)` on the CPU.
    """
    logprobs = torch.zeros(len(prompt_ids), len(token_ids))
    # The token that is joined to a prompt only marks the position that predicts it.
    one_token = [token_ids[:1]] * len(prompt_ids)
    for indices, inputs, is_response in _teacher_forced(prompt_ids, one_token, batch_size, execution_device(lm)):
        (after,) = _response_logprobs(lm, inputs, is_response)  # (rows, vocab)
        logprobs[indices] = after[:, token_ids].cpu()
    return logprobs
