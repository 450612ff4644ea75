"""The record of a generation: what was decided in each row, and what the gate read when it decided."""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation import GenerateDecoderOnlyOutput

from .candidates import NUM_SCALARS, Candidates, candidate_scalars


class Decisions(NamedTuple):
    """What happened in each row of a batch; all `(batch,)` int64.

    Attributes:
        tokens: accepted tokens, an end-of-sequence token included.
        proposals: candidates that were offered.
        accepts: candidates that the gate accepted.
        forced: candidates that were accepted without asking, being the last of their position.
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
        hidden: `(B, H, state_size)` in the LM's dtype; state_size is the LM's hidden size, times the number
            of layers that the gate reads, twice that with pooled features.
        hidden_index: `(B, D)` int64, which of the H a decision read.
        positions: `(B, D)` int64, which token of the response a decision was about, from 0.
        token_ids: `(B, D)` int64, the candidate that was judged.
        scalars: `(B, D, NUM_SCALARS)` float32, see `candidates.candidate_scalars`; zero for candidate features.
        accept: `(B, D)` bool, the action.
        mask: `(B, D)` bool, True for a decision; they come first.
        lm_log_probs: `(B, D)` float32, at the last decision of a position the log-probability that the LM gave the
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


@dataclass
class ProxyGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns: transformers' fields and the record of decisions."""

    decisions: Decisions | None = None
    rollout: Rollout | None = None


class Step(NamedTuple):
    """One token of every row, decided with prefix features: `hidden` `(B, d)` or None, `sequence_positions` `(B,)`."""

    candidates: Candidates
    rank: torch.Tensor
    hidden: torch.Tensor | None
    sequence_positions: torch.Tensor


def record_steps(
    steps: list[Step], responses: torch.Tensor, eos_token_ids: torch.Tensor, stopped: Sequence[torch.Tensor] = ()
) -> tuple[Decisions, Rollout | None]:
    """The record of responses `(B, T)` that were decided step by step; a rollout where the steps kept `hidden`."""
    steps = steps[: responses.shape[1]]
    candidates = Candidates(*(torch.stack(x, 1) for x in zip(*(step.candidates for step in steps))))
    rank = torch.stack([step.rank for step in steps], 1)
    # A row is over after an end-of-sequence token, or where another stopping criterion has put padding in place of the
    # token that was accepted.
    as_decided = candidates.token_ids.gather(-1, rank[..., None])[..., 0] == responses
    ended = torch.isin(responses, eos_token_ids)
    if len(stopped):
        ended = ended | torch.stack(stopped, 1)[:, : ended.shape[1]]
    alive = as_decided & (ended.cumsum(-1) - ended.long() == 0)
    alive = alive.long().cumprod(-1).bool()

    last = candidates.counts - 1
    asked = torch.where(alive, torch.minimum(rank + 1, last), 0)
    forced = ((rank == last) & alive).sum(-1)
    tokens = alive.sum(-1)
    rejections = torch.where(alive, rank, 0).sum(-1)
    decisions = Decisions(tokens, rejections + tokens, tokens - forced, forced, rejections, tokens.clone())
    if steps[0].hidden is None:
        return decisions, None

    # (B, T, K) -> (B, D): the decisions in front, in the order of positions and then of ranks.
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


class Event(NamedTuple):
    """N decisions taken at once, in different rows, with candidate features; `hidden` is `(N, d)`, the rest `(N,)`."""

    rows: torch.Tensor
    hidden: torch.Tensor
    positions: torch.Tensor
    token_ids: torch.Tensor
    accept: torch.Tensor
    lm_log_probs: torch.Tensor


def record_events(events: list[Event], token_log_probs: torch.Tensor) -> Rollout:
    """The rollout of decisions that came row by row, in any order of rows; `events` must not be empty."""
    batch, device = len(token_log_probs), token_log_probs.device
    event = Event(*(torch.cat(x) for x in zip(*events)))
    counts = torch.bincount(event.rows, minlength=batch)
    width = max(int(counts.max()), 1)
    order = event.rows.argsort(stable=True)
    rows = event.rows[order]
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


class TracedToken(NamedTuple):
    """A token of a response with the candidates that were rejected before it, as in Figure 1 of the paper.

    `asked` is False where the token was taken without a decision, being the last candidate of its position.
    """

    token_id: int
    rejected: list[int]
    asked: bool


def trace(rollout: Rollout, responses: list[list[int]]) -> list[list[TracedToken]]:
    """What was proposed for every token of the responses (token ids without padding): one list per row, to be read."""
    traced = []
    columns = (x.tolist() for x in (rollout.positions, rollout.token_ids, rollout.accept, rollout.mask))
    for response, *decisions in zip(responses, *columns, strict=True):
        tokens = [TracedToken(token, [], False) for token in response]
        for position, candidate, accept, is_decision in zip(*decisions, strict=True):
            if is_decision and position < len(tokens):
                if accept:
                    tokens[position] = tokens[position]._replace(asked=True)
                else:
                    tokens[position].rejected.append(candidate)
        traced.append(tokens)
    return traced


# A character has four bytes at most, and so four tokens.
MAX_TOKENS_PER_CHARACTER = 4
# Pieces of text that are decoded again before a token. A tokenizer needs one of them to tell whether a space is before
# the token, and two to clean up `do n ' t`; two more may be empty.
CONTEXT_PIECES = 4
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def trace_texts(tokens: Sequence[TracedToken], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[str]]]:
    """What each token of a response reads, and what the candidates rejected before it would have read.

    A token alone has no certain text: a tokenizer may drop its space, or split a character into several tokens. So
    each token is decoded after the few tokens before it. Special tokens are texts too.

    Returns:
        one pair `(text, rejected texts)` per token. The texts of the tokens, joined, equal `tokenizer.decode` of the
        whole response. A token that leaves a character incomplete has the text "". The token that completes the
        character has all of it. A rejected text is what the candidate adds to the tokens before it. Bytes of an
        incomplete character read `<0xF0 0x9F>` there. A candidate that adds no text has its name in the vocabulary.
    """
    ids = [token.token_id for token in tokens]
    whole = tokenizer.decode(ids)
    texts = []
    written = 0  # characters of `whole`
    # Token counts at which `whole` was cut into pieces, the latest last.
    cuts = deque([0], maxlen=CONTEXT_PIECES + 1)
    for i, token in enumerate(tokens):
        # A character cannot take this long: invalid bytes changed how the bytes before them read. Only the text from
        # the start of the response is certain then.
        start = cuts[0] if i - cuts[-1] < MAX_TOKENS_PER_CHARACTER else 0
        read = tokenizer.decode(ids[start : cuts[-1]]) if start else whole[:written]
        before = tokenizer.decode(ids[start:i])
        rejected = [_rejected_text(candidate, ids[start:i], read, before, tokenizer) for candidate in token.rejected]
        after = tokenizer.decode(ids[start : i + 1])
        text = ""
        if i + 1 == len(tokens):
            text = whole[written:]
        elif after.startswith(read) and whole.startswith(after[len(read) :], written):
            text = after[len(read) :]
            cuts.append(i + 1)
        written += len(text)
        texts.append((text, rejected))
    return texts


def _rejected_text(candidate: int, ids: list[int], read: str, before: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the candidate adds to the tokens `ids`; `before` is their text, `read` the whole characters of it."""
    after = tokenizer.decode([*ids, candidate])
    text = _added(after, read)
    if not text or REPLACEMENT in text:  # a character is incomplete: the candidate's, or one before it
        raw = _token_bytes(candidate, tokenizer)
        text = _added(after, before) if raw is None else _with_hexadecimal(raw)
    return text or tokenizer.convert_ids_to_tokens(candidate) or ""  # an LM may have more ids than its tokenizer


def _added(text: str, beginning: str) -> str:
    """The text after what it has in common with `beginning`."""
    same = [a == b for a, b in zip(text, beginning)]
    return text[[*same, False].index(False) :]


def _token_bytes(token_id: int, tokenizer: PreTrainedTokenizerBase) -> bytes | None:
    """The bytes of a byte-level token, or of a byte token such as `<0xF0>`; None for other tokens."""
    name = tokenizer.convert_ids_to_tokens(token_id) or ""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        raw = bytes.fromhex(byte[1])
    elif all(character in BYTE_OF_CHARACTER for character in name):
        raw = bytes(BYTE_OF_CHARACTER[character] for character in name)
    else:
        return None
    # The token `é` is the byte 0xE9 of a byte-level vocabulary, and a letter of any other.
    return raw if raw.decode("utf-8", "replace") == tokenizer.decode([token_id]) else None


def _with_hexadecimal(raw: bytes) -> str:
    """The bytes as text; those that are no UTF-8 read `<0xF0 0x9F>`."""
    text = raw.decode("utf-8", "surrogateescape")  # the byte 0xF0 becomes U+DCF0 if it is no UTF-8
    return re.sub("[\udc80-\udcff]+", lambda run: f"<{' '.join(f'0x{ord(c) - 0xDC00:02X}' for c in run[0])}>", text)
