"""Which tokens the frozen LM proposes at a position, and in which order.

This is the first part of the stable knowledge-aware module (SKAM) of Proxy-RLHF (arXiv 2403.04283, section 3): the
proposals are restricted to tokens that the LM itself finds plausible, and no token is offered twice at one position.
Pure functions on logits; nothing here knows of a gate.
"""

import math
from typing import NamedTuple

import torch

from .config import ProxyConfig


class Candidates(NamedTuple):
    """The proposals of a batch of positions, in the order in which they are offered.

    Attributes:
        token_ids: `(..., K)` int64. Entries outside `mask` are arbitrary.
        log_probs: `(..., K)` float32, log-probability under the LM's softmax at the proposal temperature (before the
            truncation, so they sum to at most one).
        mask: `(..., K)` bool, True for a real candidate; True entries come first and there is at least one.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor
    mask: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """`(...)` int64, number of candidates of each position."""
        return self.mask.sum(-1)


def propose(
    logits: torch.Tensor,
    p_t: float,
    p_t_mode: str = "relative",
    max_candidates: int = 16,
    temperature: float = 1.0,
    proposal: str = "ranked",
) -> Candidates:
    """Candidates of every position (arXiv 2403.04283, section 3: the token threshold `p_t`).

    Args:
        logits: `(..., vocab)` next-token logits of the LM after the caller's logits processors. A banned token is -inf
            and is never a candidate.
        p_t: smallest probability a candidate may have, in (0, 1].
        p_t_mode: `"relative"` to the most probable token (as in min-p sampling) or `"absolute"`.
        max_candidates: upper bound K on the candidates of one position.
        temperature: the logits are divided by it.
        proposal: `"ranked"` offers in descending probability, ties by the lower token id, so that the first candidate
            is the one that `argmax` picks; `"sampled"` draws without replacement in proportion to probability
            (Gumbel top-k, arXiv 1903.06059) with torch's global generator.

    Returns:
        [`Candidates`] with K = min(max_candidates, vocab).
    """
    logits = logits.float()
    k = min(max_candidates, logits.shape[-1])
    top, token_ids = logits.topk(k, dim=-1)
    # `topk` leaves the order of ties open, and bfloat16 logits tie often: order by id first, then stably by logit.
    token_ids, by_id = token_ids.sort(dim=-1)
    top, by_logit = top.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    token_ids = token_ids.gather(-1, by_logit)
    token_ids[..., 0] = logits.argmax(dim=-1)  # the lowest id that ties, even if all tokens are banned

    if temperature != 1.0:
        logits, top = logits / temperature, top / temperature
    # NaN only if every token of a position is banned: its first candidate is still taken.
    log_probs = (top - logits.logsumexp(-1, keepdim=True)).nan_to_num(nan=0.0, neginf=-torch.inf)
    floor = math.log(p_t) + (log_probs[..., :1] if p_t_mode == "relative" else 0.0)
    mask = (log_probs >= floor) & (top > -torch.inf)
    mask[..., 0] = True
    # There may be more ties at the last place than there is room for: `topk` keeps any of them. A CPU asks first
    # whether there are; elsewhere that would wait for the device.
    crowded, tied = mask[..., -1], top[..., -1:]
    if (on_cpu := crowded.device.type == "cpu") and crowded.any():
        crowded = crowded & ((logits == tied).sum(-1) > (top == tied).sum(-1))
    if not on_cpu or crowded.any():
        token_ids = torch.where(crowded[..., None], _with_lowest_ids(logits, top, token_ids), token_ids)
    if proposal == "sampled":
        keys = log_probs - torch.empty_like(log_probs).exponential_().log()  # log p + Gumbel noise
        order = keys.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True)
        token_ids, log_probs, mask = (x.gather(-1, order) for x in (token_ids, log_probs, mask))
    return Candidates(token_ids, log_probs, mask)


def _with_lowest_ids(logits: torch.Tensor, top: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The `token_ids` `(..., K)` of the `top` logits, where those that tie with the last are the lowest that do."""
    tied = top[..., -1:]
    ahead = (top > tied).sum(-1, keepdim=True)
    place = torch.arange(top.shape[-1], device=top.device) - ahead
    ties_so_far = (logits == tied).cumsum(-1, dtype=torch.int32)
    lowest = torch.searchsorted(ties_so_far, (place + 1).int()).clamp(max=logits.shape[-1] - 1)
    return torch.where(place < 0, token_ids, lowest)


def propose_for(config: ProxyConfig, scores: torch.Tensor) -> Candidates:
    """[`candidates.propose`] with a proxy's settings."""
    return propose(scores, config.p_t, config.p_t_mode, config.max_candidates, config.temperature, config.proposal)
