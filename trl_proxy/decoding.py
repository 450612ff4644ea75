"""Gated decoding: how proposals of the frozen LM become a response, and the record of every decision.

Two paths share one decision process. With prefix features [`PrefixGate`] sits as the last logits processor inside
transformers' own `generate`. With candidate features a proposal has to be fed to the LM before it can be judged, so
[`candidate_decode`] is a loop of our own over a cache with one write position per row; it is plugged in through
`custom_generate`. This file knows token ids, a model and a gate; nothing of rewards or training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import LogitsProcessor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from .candidates import NUM_SCALARS, Candidates, candidate_scalars, propose
from .config import ProxyConfig
from .gate import accepted_rank, decide


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
        hidden: `(B, H, hidden_size)` in the LM's dtype.
        hidden_index: `(B, D)` int64, which of the H a decision read.
        token_ids: `(B, D)` int64, the candidate that was judged.
        scalars: `(B, D, NUM_SCALARS)` float32, see `candidates.candidate_scalars`.
        accept: `(B, D)` bool, the action.
        mask: `(B, D)` bool, True for a decision; they come first.
        lm_log_probs: `(B, D)` float32, at the last decision of a position the log-probability that the LM gave the
            token accepted there, else 0.
        token_log_probs: `(B,)` float32, sum over the response's tokens of the LM's log-probability.
    """

    hidden: torch.Tensor
    hidden_index: torch.Tensor
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


class HiddenTap:
    """Context manager that sees the last hidden state on its way into the LM's head.

    `hidden` is `(batch, positions, hidden_size)` of the last forward. Where `select` is set, it is called with that
    tensor and returns what the head shall run on instead: the head is a fifth of a small LM's work.
    """

    def __init__(self, lm: nn.Module, select: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.lm, self.select, self.hidden = lm, select, None

    def __enter__(self) -> "HiddenTap":
        self._hook = self.lm.get_output_embeddings().register_forward_pre_hook(self._tap)
        return self

    def __exit__(self, *exc) -> None:
        self._hook.remove()

    def _tap(self, _module, args):
        self.hidden = args[0]
        return None if self.select is None else (self.select(args[0]), *args[1:])


class PrefixGate(LogitsProcessor):
    """The gate as the last logits processor: it leaves one token per row, the accepted candidate.

    Args:
        judge: `(hidden (B, d), candidates (B, K), positions (B,)) -> accept logits (B, K)`.
        config: how candidates are formed.
        tap: sees the hidden state of the step.
        attention_mask: `(B, prompt length)` of the prompts.
        threshold, sample: see `gate.decide`.
        keep_hidden: keep what a [`Rollout`] needs.
    """

    def __init__(self, judge, config: ProxyConfig, tap: HiddenTap, attention_mask, threshold, sample, keep_hidden):
        self.judge, self.config, self.tap = judge, config, tap
        self.threshold, self.sample, self.keep_hidden = threshold, sample, keep_hidden
        self.prompt_width = attention_mask.shape[1]
        self.prompt_lengths = attention_mask.sum(-1)
        self.steps: list[tuple[Candidates, torch.Tensor, torch.Tensor | None, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self.prompt_lengths) != len(input_ids):  # several sequences per prompt
            self.prompt_lengths = self.prompt_lengths.repeat_interleave(len(input_ids) // len(self.prompt_lengths))
        positions = self.prompt_lengths + (input_ids.shape[1] - self.prompt_width)
        hidden = self.tap.hidden[:, -1]
        candidates = propose_for(self.config, scores)
        accept = decide(self.judge(hidden, candidates, positions), self.threshold, self.sample)
        rank = accepted_rank(accept, candidates.mask)
        self.steps.append((candidates, rank, hidden if self.keep_hidden else None, positions))
        chosen = candidates.token_ids.gather(-1, rank[:, None])
        return scores.fill_(-torch.inf).scatter_(-1, chosen, 0.0)

    def record(self, responses: torch.Tensor, eos_token_ids: torch.Tensor) -> tuple[Decisions, Rollout | None]:
        """Decisions and, with `keep_hidden`, the rollout of finished responses `(B, T)`."""
        steps = self.steps[: responses.shape[1]]
        candidates = Candidates(*(torch.stack(x, 1) for x in zip(*(s[0] for s in steps), strict=True)))
        rank = torch.stack([s[1] for s in steps], 1)
        # A row is over after an end-of-sequence token, or where another stopping criterion has put padding in place of
        # the token that was accepted.
        follows = candidates.token_ids.gather(-1, rank[..., None])[..., 0] == responses
        ended = torch.isin(responses, eos_token_ids)
        alive = follows & (ended.cumsum(-1) - ended.long() == 0)
        alive = alive.long().cumprod(-1).bool()

        last = candidates.counts - 1
        asked = torch.where(alive, torch.minimum(rank + 1, last), 0)
        forced = (rank == last) & alive
        tokens = alive.sum(-1)
        rejections = torch.where(alive, rank, 0).sum(-1)
        decisions = Decisions(
            tokens, rejections + tokens, tokens - forced.sum(-1), forced.sum(-1), rejections, tokens.clone()
        )
        if not self.keep_hidden:
            return decisions, None

        # (B, T, K) -> (B, D): the decisions in front, in the order of positions and then of ranks.
        batch, length, k = candidates.token_ids.shape
        ranks = torch.arange(k, device=rank.device)
        is_decision = ranks < asked[..., None]
        ends_position = ranks == asked[..., None] - 1
        order = is_decision.flatten(1).long().argsort(dim=-1, descending=True, stable=True)
        order = order[:, : max(int(is_decision.sum((1, 2)).max()), 1)]
        pick = lambda x: x.expand(batch, length, k).flatten(1).gather(1, order)  # noqa: E731
        token_log_probs = candidates.log_probs.gather(-1, rank[..., None])
        positions = torch.stack([s[3] for s in steps], 1)
        scalars = candidate_scalars(candidates, positions).flatten(1, 2)
        rollout = Rollout(
            hidden=torch.stack([s[2] for s in steps], 1),
            hidden_index=order // k,
            token_ids=pick(candidates.token_ids),
            scalars=scalars.gather(1, order[..., None].expand(-1, -1, NUM_SCALARS)),
            accept=pick(ranks == rank[..., None]),
            mask=pick(is_decision),
            lm_log_probs=pick(token_log_probs) * pick(ends_position),
            token_log_probs=torch.where(alive, token_log_probs[..., 0], 0.0).sum(-1),
        )
        return decisions, rollout


def propose_for(config: ProxyConfig, scores: torch.Tensor) -> Candidates:
    """[`candidates.propose`] with a proxy's settings."""
    return propose(scores, config.p_t, config.p_t_mode, config.max_candidates, config.temperature, config.proposal)


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer, `(rows, heads, capacity, head size)`, written where the cache's rows stand."""

    is_sliding = False

    def __init__(self, cache: "RowCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states, value_states):
        shape = lambda x: (*x.shape[:2], self.cache.capacity, x.shape[-1])  # noqa: E731
        self.keys = key_states.new_zeros(shape(key_states))
        self.values = value_states.new_zeros(shape(value_states))
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cache.slots is None:
            self.keys[:, :, : self.cache.width] = key_states
            self.values[:, :, : self.cache.width] = value_states
        else:
            rows = torch.arange(len(key_states), device=key_states.device)
            self.keys[rows, :, self.cache.slots] = key_states[:, :, 0]
            self.values[rows, :, self.cache.slots] = value_states[:, :, 0]
        return self.keys[:, :, : self.cache.width], self.values[:, :, : self.cache.width]

    def get_mask_sizes(self, query_length):
        return self.cache.width, 0

    def get_seq_length(self):
        return 0 if self.cache.slots is None else self.cache.width - 1

    def get_max_length(self):
        return self.cache.capacity


class RowCache(Cache):
    """A key-value cache with one write position per row, so that a rejected token's slot is simply overwritten.

    The prompt is written first, slots 0 to `width - 1`. From `at(slots)` on, the one new token of row r goes to
    `slots[r]`; whatever stands to the right of it is hidden by the attention mask, which is the caller's.
    """

    def __init__(self, num_layers: int, prompt_width: int, capacity: int):
        self.capacity, self.width, self.slots = capacity, prompt_width, None
        super().__init__(layers=[_RowLayer(self) for _ in range(num_layers)])

    def at(self, slots: torch.Tensor) -> int:
        """Sets the write positions `(rows,)` of the next forward; returns how many slots it sees."""
        self.slots, self.width = slots, int(slots.max()) + 1
        return self.width

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps these rows alone, in this order."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class _Events:
    """Decisions of the candidate loop as they come, flat; [`Rollout`] at the end."""

    def __init__(self):
        self.parts: list[tuple[torch.Tensor, ...]] = []

    def add(self, rows, hidden, token_ids, accept, ends_position, log_probs):
        if len(rows):
            self.parts.append((rows, hidden, token_ids, accept, torch.where(ends_position, log_probs, 0.0)))

    def rollout(self, batch: int, hidden_size: int, dtype, token_log_probs: torch.Tensor) -> Rollout:
        device = token_log_probs.device
        if not self.parts:
            rows, token_ids = (torch.zeros(0, dtype=torch.long, device=device) for _ in range(2))
            hidden = torch.zeros(0, hidden_size, dtype=dtype, device=device)
            accept, log_probs = rows.bool(), rows.float()
        else:
            rows, hidden, token_ids, accept, log_probs = (torch.cat(x) for x in zip(*self.parts, strict=True))
        counts = torch.bincount(rows, minlength=batch)
        width = max(int(counts.max()), 1)
        order = rows.argsort(stable=True)
        rows = rows[order]
        place = torch.arange(len(rows), device=device) - (counts.cumsum(0) - counts)[rows]

        def padded(values: torch.Tensor) -> torch.Tensor:
            out = values.new_zeros(batch, width, *values.shape[1:])
            out[rows, place] = values[order]
            return out

        index = torch.arange(width, device=device).expand(batch, width)
        return Rollout(
            hidden=padded(hidden),
            hidden_index=index,
            token_ids=padded(token_ids),
            scalars=torch.zeros(batch, width, NUM_SCALARS, device=device),
            accept=padded(accept),
            mask=index < counts[:, None],
            lm_log_probs=padded(log_probs),
            token_log_probs=token_log_probs,
        )


@torch.no_grad()
def candidate_decode(
    lm,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    judge: Callable[[torch.Tensor], torch.Tensor],
    config: ProxyConfig,
    threshold: float,
    sample: bool,
    streamer=None,
    output_rollout: bool = False,
    repeats: int = 1,
    **model_kwargs,
) -> ProxyGenerateOutput:
    """Decoding with candidate features: feed a candidate, ask the gate, keep it or overwrite it.

    Every row goes its own way: in one forward some rows advance to the next position while others retry the one that
    they are at. The gate decides between the LM's body and its head, and the head runs for the accepted rows alone.

    Args:
        input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: as transformers' `generate`
            hands them to a `custom_generate` function.
        judge: `(hidden (N, d)) -> accept logits (N,)`.
        config, threshold, sample: see `propose_for` and `gate.decide`.
        streamer: gets a token when it is accepted.
        output_rollout: also return the [`Rollout`].
        repeats: every so many consecutive rows share a prompt, which is read once.

    Returns:
        [`ProxyGenerateOutput`]; `sequences` is `(batch, prompt length + longest response)`, padded on the right.
    """
    batch, prompt_width = input_ids.shape
    device = input_ids.device
    max_new_tokens = generation_config.max_length - prompt_width
    attention_mask = model_kwargs.get("attention_mask")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    eos = generation_config._eos_token_tensor
    eos = torch.zeros(0, dtype=torch.long, device=device) if eos is None else eos
    pad = generation_config._pad_token_tensor
    own_criteria = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]

    # Per row of the batch
    sequences = torch.full((batch, generation_config.max_length), 0 if pad is None else int(pad), device=device)
    sequences[:, :prompt_width] = input_ids
    counts = torch.zeros(4, batch, dtype=torch.long, device=device)  # tokens, rejections, forced, forwards
    token_log_probs = torch.zeros(batch, device=device)
    events = _Events()
    # Per active row
    rows = torch.arange(batch, device=device)
    length = torch.zeros(batch, dtype=torch.long, device=device)
    visible = torch.zeros(batch, generation_config.max_length, dtype=torch.long, device=device)
    visible[:, :prompt_width] = attention_mask
    prompt_lengths = attention_mask.sum(-1)

    def finished(which: torch.Tensor, tokens: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
        """Accepts `tokens` in the active rows `which`; returns which of these rows end."""
        nonlocal length
        sequences[rows[which], prompt_width + length[which]] = tokens
        length = length.index_add(0, which, torch.ones_like(which))
        done = final
        if own_criteria:
            done = done | by_length(which, lambda ids, group: stopping_criteria(ids, None))
        if streamer is not None:
            streamer.put(tokens.cpu())
        return done

    def by_length(which: torch.Tensor, call) -> torch.Tensor:
        """`call(sequences, group)` on rows of equal length: processors and criteria know rectangular ids alone."""
        results, order = [], []
        for n in length[which].unique().tolist():
            group = (length[which] == n).nonzero()[:, 0]
            results.append(call(sequences[rows[which[group]], : prompt_width + n], group))
            order.append(group)
        return torch.cat(results)[torch.cat(order).argsort()]

    def candidates_of(which: torch.Tensor, logits: torch.Tensor) -> Candidates:
        logits = logits.float()
        if len(logits_processor):
            logits = by_length(which, lambda ids, group: logits_processor(ids, logits[group]))
        return propose_for(config, logits)

    # Prefill
    cache = RowCache(lm.config.get_text_config().num_hidden_layers, prompt_width, generation_config.max_length)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with HiddenTap(lm) as tap:
        output = lm(
            input_ids=input_ids[::repeats],
            attention_mask=attention_mask[::repeats],
            position_ids=positions[::repeats],
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": 1} if "logits_to_keep" in model_kwargs else {}),
        )
    logits = output.logits[:, -1]
    if repeats > 1:
        cache.select_rows(rows // repeats)
        logits = logits.repeat_interleave(repeats, dim=0)
    hidden_size, hidden_dtype = tap.hidden.shape[-1], tap.hidden.dtype
    counts[3] += 1
    candidates = candidates_of(rows, logits)
    rank = torch.zeros_like(rows)

    while True:
        last = candidates.counts - 1
        token = candidates.token_ids.gather(-1, rank[:, None])[:, 0]
        log_prob = candidates.log_probs.gather(-1, rank[:, None])[:, 0]
        forced = rank == last
        final = torch.isin(token, eos) | (length + 1 >= max_new_tokens)

        # A forced token that ends its response needs no forward, as in plain decoding.
        active = torch.ones_like(forced)
        instant = (forced & final).nonzero()[:, 0]
        if len(instant):
            finished(instant, token[instant], final[instant])
            counts[0, rows[instant]] += 1
            counts[2, rows[instant]] += 1
            token_log_probs[rows[instant]] += log_prob[instant]
            active[instant] = False
        if not active.any():
            break
        if len(instant):
            keep = active.nonzero()[:, 0]
            cache.select_rows(keep)
            rows, length, visible, prompt_lengths, rank = (
                x[keep] for x in (rows, length, visible, prompt_lengths, rank)
            )
            candidates = Candidates(*(x[keep] for x in candidates))
            token, log_prob, forced, final, last = (x[keep] for x in (token, log_prob, forced, final, last))

        slots = prompt_width + length
        visible = visible.scatter(1, slots[:, None], 1)
        width = cache.at(slots)
        state = {}

        def select(hidden: torch.Tensor) -> torch.Tensor:
            at_candidate = hidden[:, -1]
            asked = (~forced).nonzero()[:, 0]
            accept = forced.clone()
            if len(asked):
                accept[asked] = decide(judge(at_candidate[asked]), threshold, sample)
            state.update(hidden=at_candidate, asked=asked, accept=accept)
            # The head runs where the next position's proposals are needed.
            state["going"] = (accept & ~final).nonzero()[:, 0]
            return hidden[state["going"]]

        with HiddenTap(lm, select):
            output = lm(
                input_ids=token[:, None],
                attention_mask=visible[:, :width],
                position_ids=(prompt_lengths + length)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
        accept, asked, going = state["accept"], state["asked"], state["going"]
        counts[3, rows] += 1
        counts[1, rows] += (~accept).long()
        counts[0, rows] += accept.long()
        counts[2, rows] += forced.long()
        token_log_probs[rows] += torch.where(accept, log_prob, 0.0)
        if output_rollout:
            # A position's last decision accepts, or rejects all but the last candidate, which then is forced.
            to_last = ~accept & (rank + 1 == last)
            ending_log_prob = torch.where(to_last, candidates.log_probs.gather(-1, last[:, None])[:, 0], log_prob)
            ends = (accept | to_last)[asked]
            events.add(rows[asked], state["hidden"][asked], token[asked], accept[asked], ends, ending_log_prob[asked])

        accepted = accept.nonzero()[:, 0]
        rank = torch.where(accept, 0, rank + 1)
        ended = torch.zeros_like(accept)
        if len(accepted):
            ended[accepted] = finished(accepted, token[accepted], final[accepted])
        if len(going):
            new = candidates_of(going, output.logits[:, -1])
            candidates = Candidates(*(x.index_copy(0, going, y) for x, y in zip(candidates, new, strict=True)))
        if ended.any():
            keep = (~ended).nonzero()[:, 0]
            if not len(keep):
                break
            cache.select_rows(keep)
            rows, length, visible, prompt_lengths, rank = (
                x[keep] for x in (rows, length, visible, prompt_lengths, rank)
            )
            candidates = Candidates(*(x[keep] for x in candidates))

    if streamer is not None:
        streamer.end()
    tokens, rejections, forced, forwards = counts
    decisions = Decisions(tokens, tokens + rejections, tokens - forced, forced, rejections, forwards)
    rollout = None
    if output_rollout:
        rollout = events.rollout(batch, hidden_size, hidden_dtype, token_log_probs)
    return ProxyGenerateOutput(
        sequences=sequences[:, : prompt_width + int(tokens.max())], decisions=decisions, rollout=rollout
    )
