"""The record of a generation: what was decided in each row, and what the gate read when it decided."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .candidates import Candidates
from .features import NUM_SCALARS, candidate_scalars


class Decisions(NamedTuple):
    """What happened in each row of a batch; all `(batch,)` int64.

    Attributes:
        tokens: accepted tokens, an end-of-sequence token included.
        proposals: candidates that were offered.
        accepts: candidates that the gate accepted.
        forced: candidates that were accepted without asking, as the last of their position.
        rank_sum: rejections, which is the sum of the accepted candidates' ranks.
        lm_forwards: forward passes of the LM in which the row took part, the prompt's included.
    """

    tokens: torch.Tensor
    proposals: torch.Tensor
    accepts: torch.Tensor
    forced: torch.Tensor
    rank_sum: torch.Tensor
    lm_forwards: torch.Tensor


class Rollout(NamedTuple):
    """The decisions of a batch in the order in which they were taken, with what the gate read.

    Shapes: B rows, D decisions at most per row, H cached hidden states per row.

    Attributes:
        hidden: `(B, H, state_size)` in the LM's dtype. state_size is the LM's hidden size times the number of
            layers that the gate reads; pooled features double it.
        hidden_index: `(B, D)` int64, which of the H a decision read.
        positions: `(B, D)` int64, which token of the response a decision was about, from 0.
        token_ids: `(B, D)` int64, the candidate that was judged.
        scalars: `(B, D, NUM_SCALARS)` float32, see [`candidate_scalars`]; zero for candidate features.
        accept: `(B, D)` bool, the action.
        mask: `(B, D)` bool, True for a decision; they come first.
        lm_log_probs: `(B, D)` float32. At the last decision of a position it is the LM's log-probability of the
            token accepted there, else 0.
        token_log_probs: `(B,)` float32, sum over the response's tokens of the LM's log-probability.
    """

    hidden: torch.Tensor
    hidden_index: torch.Tensor
    positions: torch.Tensor
    token_ids: torch.Tensor
    scalars: torch.Tensor
    accept: torch.Tensor
    mask: torch.Tensor
    lm_log_probs: torch.Tensor
    token_log_probs: torch.Tensor


class PrefixStep(NamedTuple):
    """One token of every row, decided with prefix features: `hidden` `(B, d)` or None, `sequence_positions` `(B,)`."""

    candidates: Candidates
    rank: torch.Tensor
    hidden: torch.Tensor | None
    sequence_positions: torch.Tensor


def record_prefix_steps(
    steps: list[PrefixStep], responses: torch.Tensor, eos_token_ids: torch.Tensor, stopped: Sequence[torch.Tensor] = ()
) -> tuple[Decisions, Rollout | None]:
    """The record of responses `(B, T)` that were decided step by step; a rollout if the steps kept `hidden`."""
    steps = steps[: responses.shape[1]]
    candidates = Candidates(*(torch.stack(x, 1) for x in zip(*(step.candidates for step in steps))))
    rank = torch.stack([step.rank for step in steps], 1)
    # (3) EOS: a row ends after an end-of-sequence token, which was decided. It also ends if another stopping criterion
    # replaced the accepted token by padding.
    as_decided = candidates.token_ids.gather(-1, rank[..., None])[..., 0] == responses
    ended = torch.isin(responses, eos_token_ids)
    if len(stopped):
        ended = ended | torch.stack(stopped, 1)[:, : ended.shape[1]]
    alive = as_decided & (ended.cumsum(-1) - ended.long() == 0)
    alive = alive.long().cumprod(-1).bool()

    # (1) Forced last candidate: it is not a decision, so a position with `counts` candidates has one decision fewer.
    last = candidates.counts - 1
    asked = torch.where(alive, torch.minimum(rank + 1, last), 0)
    forced = ((rank == last) & alive).sum(-1)
    tokens = alive.sum(-1)
    rejections = torch.where(alive, rank, 0).sum(-1)
    decisions = Decisions(tokens, rejections + tokens, tokens - forced, forced, rejections, tokens.clone())
    if steps[0].hidden is None:
        return decisions, None

    # (2) Decision mask, (B, T, K) -> (B, D): decisions come first, ordered by position and then by rank.
    batch, length, k = candidates.token_ids.shape
    ranks = torch.arange(k, device=rank.device)
    is_decision = ranks < asked[..., None]
    order = is_decision.flatten(1).long().argsort(dim=-1, descending=True, stable=True)
    order = order[:, : max(int(is_decision.sum((1, 2)).max()), 1)]

    def pick(values: torch.Tensor) -> torch.Tensor:
        return values.expand(batch, length, k).flatten(1).gather(1, order)

    log_prob = candidates.log_probs.gather(-1, rank[..., None])
    scalars = candidate_scalars(candidates, torch.stack([step.sequence_positions for step in steps], 1))
    return decisions, Rollout(
        hidden=torch.stack([step.hidden for step in steps], 1),
        hidden_index=order // k,
        positions=order // k,
        token_ids=pick(candidates.token_ids),
        scalars=scalars.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, NUM_SCALARS)),
        accept=pick(ranks == rank[..., None]),
        mask=pick(is_decision),
        lm_log_probs=pick(log_prob) * pick(ranks == asked[..., None] - 1),
        token_log_probs=torch.where(alive, log_prob[..., 0], 0.0).sum(-1),
    )


class CandidateDecisions(NamedTuple):
    """N candidates that were fed at once, with candidate features; `hidden` is `(N, d)`, the rest `(N,)`. Those where
    `mask` is False were no decisions."""

    mask: torch.Tensor
    rows: torch.Tensor
    hidden: torch.Tensor
    positions: torch.Tensor
    token_ids: torch.Tensor
    accept: torch.Tensor
    lm_log_probs: torch.Tensor


def record_candidate_decisions(events: list[CandidateDecisions], token_log_probs: torch.Tensor) -> Rollout:
    """The rollout of decisions that came row by row, in any order of rows; `events` must not be empty."""
    batch, device = len(token_log_probs), token_log_probs.device
    event = CandidateDecisions(*(torch.cat(x) for x in zip(*events)))
    decisions = event.mask.nonzero()[:, 0]
    order = decisions[event.rows[decisions].argsort(stable=True)]
    rows = event.rows[order]
    counts = torch.bincount(rows, minlength=batch)
    width = max(int(counts.max()), 1)
    place = torch.arange(len(rows), device=device) - (counts.cumsum(0) - counts)[rows]

    def padded(values: torch.Tensor) -> torch.Tensor:
        out = values.new_zeros(batch, width, *values.shape[1:])
        out[rows, place] = values[order]
        return out

    index = torch.arange(width, device=device).expand(batch, width)
    return Rollout(
        hidden=padded(event.hidden),
        hidden_index=index,
        positions=padded(event.positions),
        token_ids=padded(event.token_ids),
        scalars=torch.zeros(batch, width, NUM_SCALARS, device=device),
        accept=padded(event.accept),
        mask=index < counts[:, None],
        lm_log_probs=padded(event.lm_log_probs),
        token_log_probs=token_log_probs,
    )
