"""Gated decoding: how proposals of the frozen LM become a response.

Two paths share one decision process. With prefix features [`PrefixGate`] sits as the last logits processor inside
transformers' own `generate`. With candidate features a proposal has to be fed to the LM before it can be judged, so
[`candidate_decode`] is a loop of our own over a cache with one write position per row; it is plugged in through
`custom_generate`. This file knows token ids, a model and a gate; nothing of rewards or training.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .caches import RowCache
from .candidates import Candidates, propose
from .config import ProxyConfig
from .gate import accepted_rank, decide
from .rollout import Decisions, Event, ProxyGenerateOutput, Step, record_events
from .taps import HiddenTap

# With candidate features and at most so many unfinished rows, the next candidates of a position are judged in one
# forward: where reading the LM's weights is what a forward costs, a few tokens more are nearly free. On a CPU they are
# so in bfloat16: at batch 1 a forward of 4 tokens costs 1.1 of one token's, but 1.4 in float32 (docs/results.md).
TREE_ROWS = {("cpu", torch.bfloat16): 4, ("cpu", torch.float32): 0}
TREE_ROWS_ELSEWHERE = 2
TREE_CANDIDATES = 4  # more are rarely reached, and each makes the forward dearer


def propose_for(config: ProxyConfig, scores: torch.Tensor) -> Candidates:
    """[`candidates.propose`] with a proxy's settings."""
    return propose(scores, config.p_t, config.p_t_mode, config.max_candidates, config.temperature, config.proposal)


class PrefixGate(LogitsProcessor):
    """The gate as the last logits processor: it leaves one token per row, the accepted candidate.

    Args:
        judge: `(hidden (B, state size), candidates (B, K), positions (B,)) -> accept logits (B, K)`.
        config: how candidates are formed.
        tap: sees the state of the step.
        attention_mask: `(B, prompt length)` of the prompts.
        threshold, sample: see `gate.decide`.
        keep_hidden: keep what a [`rollout.Rollout`] needs.
    """

    def __init__(self, judge, config: ProxyConfig, tap: HiddenTap, attention_mask, threshold, sample, keep_hidden):
        self.judge, self.config, self.tap = judge, config, tap
        self.threshold, self.sample, self.keep_hidden = threshold, sample, keep_hidden
        self.prompt_width = attention_mask.shape[1]
        self.prompt_lengths = attention_mask.sum(-1)
        self.steps: list[Step] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        positions = self.prompt_lengths + (input_ids.shape[1] - self.prompt_width)
        hidden = self.tap.state
        candidates = propose_for(self.config, scores)
        accept = decide(self.judge(hidden, candidates, positions), self.threshold, self.sample)
        rank = accepted_rank(accept, candidates.mask)
        self.steps.append(Step(candidates, rank, hidden if self.keep_hidden else None, positions))
        chosen = candidates.token_ids.gather(-1, rank[:, None])
        # A new tensor: `output_logits` returns the one that came in.
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


class StopRecorder(StoppingCriteria):
    """The caller's criteria, and which rows they ended at each step: afterwards a response cannot tell, since padding
    may be the very token that was accepted."""

    def __init__(self, criteria: list[StoppingCriteria]):
        self.criteria = criteria
        self.stopped: list[torch.Tensor] = []

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            done = done | criterion(input_ids, scores, **kwargs)
        self.stopped.append(done)
        return done


class _Active(NamedTuple):
    """Rows that are not finished; A of them."""

    rows: torch.Tensor  # (A,) index in the batch
    length: torch.Tensor  # (A,) accepted tokens
    prompt_lengths: torch.Tensor  # (A,) without padding
    visible: torch.Tensor  # (A, slots) 0/1, those that attention sees
    rank: torch.Tensor  # (A,) which candidate is on offer
    token_ids: torch.Tensor  # (A, K) candidates, with their ...
    log_probs: torch.Tensor  # (A, K)
    last: torch.Tensor  # (A,) rank of the last candidate

    def select(self, keep: torch.Tensor) -> "_Active":
        return _Active(*(x[keep] for x in self))

    def at_rank(self, values: torch.Tensor) -> torch.Tensor:
        return values.gather(-1, self.rank[:, None])[:, 0]


class _CandidateLoop:
    """The state of [`candidate_decode`], in the order in which it happens: prefill, then offers until all rows end."""

    def __init__(self, lm, input_ids, processors, criteria, generation_config, config, streamer, tree):
        self.lm, self.config, self.streamer, self.tree = lm, config, streamer, tree
        self.processors, self.criteria = processors, criteria
        self.other_criteria = any(not isinstance(c, (MaxLengthCriteria, EosTokenCriteria)) for c in criteria)
        self.batch, self.prompt_width = input_ids.shape
        self.device, self.capacity = input_ids.device, generation_config.max_length
        self.max_new_tokens = self.capacity - self.prompt_width
        eos, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
        self.eos = torch.zeros(0, dtype=torch.long, device=self.device) if eos is None else eos
        self.sequences = input_ids.new_full((self.batch, self.capacity), 0 if pad is None else int(pad))
        self.sequences[:, : self.prompt_width] = input_ids
        self.tokens, self.rejections, self.forced, self.forwards = input_ids.new_zeros(4, self.batch)
        self.token_log_probs = torch.zeros(self.batch, device=self.device)

    def prefill(self, input_ids, attention_mask, repeats: int, keep_logits: dict) -> None:
        """Reads the prompts, each distinct one once, and forms the first candidates."""
        slots = self.capacity + TREE_CANDIDATES - 1  # room for a tree at the last position
        self.cache = RowCache(self.lm.config.get_text_config().num_hidden_layers, self.prompt_width, slots)
        with HiddenTap(self.lm, self.config.feature_layers) as tap:
            output = self.lm(
                input_ids=input_ids[::repeats],
                attention_mask=attention_mask[::repeats],
                position_ids=(attention_mask[::repeats].cumsum(-1) - 1).clamp(min=0),
                past_key_values=self.cache,
                use_cache=True,
                **keep_logits,
            )
        rows = torch.arange(self.batch, device=self.device)
        if self.config.pooled_features:
            total = (tap.hidden.float() * attention_mask[::repeats, :, None]).sum(1)
            self.total = total.repeat_interleave(repeats, dim=0)
        # An event of no rows, so that a batch without any decision has a record of the right shapes.
        none, state = input_ids.new_zeros(0), tap.state[:0].repeat(1, 2 if self.config.pooled_features else 1)
        self.events = [Event(none, state, none, none, none.bool(), none.float())]
        logits = output.logits[:, -1]
        if repeats > 1:
            self.cache.select_rows(rows // repeats)
            logits = logits.repeat_interleave(repeats, dim=0)
        self.forwards += 1
        zeros = torch.zeros_like(rows)
        visible = self.sequences.new_zeros(self.batch, slots)
        visible[:, : self.prompt_width] = attention_mask
        candidates = self._propose(rows, zeros, logits)
        self.active = _Active(
            rows, zeros, attention_mask.sum(-1), visible, zeros, *candidates[:2], last=candidates.counts - 1
        )

    def offer(self, judge, threshold: float, sample: bool, keep_hidden: bool) -> None:
        """Offers each active row its next candidate, or as a tree its next few: one forward of the LM."""
        # A forced token that ends its response needs no forward, as in plain decoding.
        token, forced = self.active.at_rank(self.active.token_ids), self.active.rank == self.active.last
        if (over := forced & self._is_final(token)).any():
            self._accept(over.nonzero()[:, 0], token, forced, over)
            self._keep((~over).nonzero()[:, 0])
            if not len(self.active.rows):
                return

        active = self.active
        rows = torch.arange(len(active.rows), device=self.device)
        n = min(int((active.last - active.rank).max()) + 1, TREE_CANDIDATES) if self._as_tree() else 1
        ranks = active.rank[:, None] + torch.arange(n, device=self.device)  # (A, n)
        tokens = active.token_ids.gather(1, torch.minimum(ranks, active.last[:, None]))
        asked = ranks < active.last[:, None]
        accept = ranks == active.last[:, None]
        state: Any = None

        def select(hidden: torch.Tensor) -> torch.Tensor:
            """Decides, between the LM's body and its head; the head runs where new candidates are needed."""
            nonlocal state
            if asked.any():
                state = self._state(tap.hidden)
                rows_asked = active.rows[:, None].expand_as(asked)[asked]
                accept[asked] = decide(judge(state[asked], rows_asked), threshold, sample)
            first = accept.long().argmax(-1)
            return hidden[rows, first][accept[rows, first] & ~self._is_final(tokens[rows, first])]

        slots = self.prompt_width + active.length
        visible = active.visible.scatter(1, slots[:, None], 1)
        width = self.cache.at(slots, n)
        with HiddenTap(self.lm, self.config.feature_layers, select) as tap:
            output = self.lm(
                input_ids=tokens,
                attention_mask=visible[:, :width] if n == 1 else self._tree_mask(active.visible[:, :width]),
                position_ids=(active.prompt_lengths + active.length)[:, None].expand(-1, n),
                past_key_values=self.cache,
                use_cache=True,
            )
        first = accept.long().argmax(-1)
        taken = accept[rows, first]
        self.forwards[active.rows] += 1
        self.rejections[active.rows] += torch.where(taken, first, n)
        if keep_hidden and asked.any():
            decided = asked & ((ranks - active.rank[:, None] <= first[:, None]) | ~taken[:, None])
            # A position's last decision accepts, or rejects all but the last candidate, which then is forced.
            to_last = ~accept & (ranks + 1 == active.last[:, None])
            log_probs = active.log_probs.gather(1, (ranks + to_last).clamp(max=active.log_probs.shape[1] - 1))
            log_probs = torch.where(accept | to_last, log_probs, 0.0)
            places = (x[:, None].expand_as(ranks) for x in (active.rows, active.length))
            event = (state, *places, tokens, accept, log_probs)
            hidden, row, length, *rest = (x[decided] for x in event)
            self.events.append(Event(row, hidden, length, *rest))
        if self.config.pooled_features:
            self.total[active.rows[taken]] += tap.hidden[rows, first][taken].float()

        self.active = active = active._replace(rank=active.rank + first, visible=visible)
        moved = (taken & (first > 0)).nonzero()[:, 0]
        if len(moved):
            self.cache.move(moved, slots[moved] + first[moved], slots[moved])
        token, forced = tokens[rows, first], active.rank == active.last
        final = self._is_final(token)
        ended = self._accept(taken.nonzero()[:, 0], token, forced, final)
        active = self.active._replace(rank=torch.where(taken, 0, active.rank + n))
        going = (taken & ~final).nonzero()[:, 0]
        if len(going):
            new = self._propose(active.rows[going], active.length[going], output.logits.view(len(going), -1))
            active = active._replace(
                token_ids=active.token_ids.index_copy(0, going, new.token_ids),
                log_probs=active.log_probs.index_copy(0, going, new.log_probs),
                last=active.last.index_copy(0, going, new.counts - 1),
            )
        self.active = active
        if ended.any():
            self._keep((~ended).nonzero()[:, 0])

    def _state(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the gate reads of the candidates just fed, `(A, n, state_size)`: their states, each with the mean of
        what was accepted before it and its own where that is asked for."""
        if not self.config.pooled_features:
            return hidden
        total = self.total[self.active.rows, None] + hidden.float()
        count = self.active.prompt_lengths + self.active.length + 1
        return torch.cat([hidden, (total / count[:, None, None]).to(hidden.dtype)], dim=-1)

    def _is_final(self, token: torch.Tensor) -> torch.Tensor:
        """`(A,)` bool: whether accepting this token ends the row."""
        return torch.isin(token, self.eos) | (self.active.length + 1 >= self.max_new_tokens)

    def _as_tree(self) -> bool:
        if self.tree is not None:
            return self.tree
        return len(self.active.rows) <= TREE_ROWS.get((self.device.type, self.lm.dtype), TREE_ROWS_ELSEWHERE)

    def _tree_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """What to add to attention's scores, `(A, 1, n, width)`: a candidate sees what was accepted, and itself."""
        slots = self.cache.slots  # (A, n)
        accepted = visible.scatter(1, slots, 0)[:, None].repeat(1, slots.shape[1], 1)
        seen = accepted.scatter(2, slots[..., None], 1)[:, None].to(self.lm.dtype)
        return (1 - seen) * torch.finfo(self.lm.dtype).min

    def _accept(self, which: torch.Tensor, token, forced, final) -> torch.Tensor:
        """Writes down `token` in the active rows `which`; returns for every active row whether it ends, `(A,)`."""
        ended = torch.zeros_like(final)
        if not len(which):
            return ended
        active = self.active
        rows = active.rows[which]
        self.sequences[rows, self.prompt_width + active.length[which]] = token[which]
        self.tokens[rows] += 1
        self.forced[rows] += forced[which].long()
        self.token_log_probs[rows] += active.at_rank(active.log_probs)[which]
        self.active = active = active._replace(length=active.length.index_add(0, which, torch.ones_like(which)))
        ended[which] = final[which]
        if self.other_criteria:
            ended[which] |= self._by_length(rows, active.length[which], lambda ids, _: self.criteria(ids, None))
        if self.streamer is not None:
            self.streamer.put(token[which].cpu())
        return ended

    def _keep(self, keep: torch.Tensor) -> None:
        """Finished rows leave the batch, and the cache."""
        self.active = self.active.select(keep)
        if len(keep):
            self.cache.select_rows(keep)

    def _propose(self, rows: torch.Tensor, length: torch.Tensor, logits: torch.Tensor) -> Candidates:
        if self.processors:
            logits = logits.float()
            logits = self._by_length(rows, length, lambda ids, group: self._process(ids, logits[group], rows[group]))
        return propose_for(self.config, logits)

    def _process(self, ids: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Processors may hold something per row of the batch (the repetition penalty does): they get all rows."""
        everyone = scores.new_zeros(self.batch, scores.shape[-1]).index_copy_(0, rows, scores)
        return self.processors(self.sequences[:, : ids.shape[1]], everyone)[rows]

    def _by_length(self, rows: torch.Tensor, length: torch.Tensor, call) -> torch.Tensor:
        """`call(ids, group)` on rows of equal length: processors and criteria know rectangular ids alone."""
        results, order = [], []
        for n in length.unique().tolist():
            group = (length == n).nonzero()[:, 0]
            results.append(call(self.sequences[rows[group], : self.prompt_width + n], group))
            order.append(group)
        return torch.cat(results)[torch.cat(order).argsort()]


@torch.no_grad()
def candidate_decode(
    lm,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    judge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    config: ProxyConfig,
    threshold: float,
    sample: bool,
    streamer=None,
    output_rollout: bool = False,
    repeats: int = 1,
    tree: bool | None = None,
    **model_kwargs,
) -> ProxyGenerateOutput:
    """Decoding with candidate features: feed a candidate, ask the gate, keep it or overwrite it.

    Every row goes its own way: in one forward some rows advance to the next position while others retry the one that
    they are at. With few rows, several candidates of a position are fed at once, each blind to the others. The gate
    decides between the LM's body and its head, and the head runs for the accepted tokens alone.

    Args:
        input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: as transformers' `generate`
            hands them to a `custom_generate` function.
        judge: `(hidden (N, d), rows (N,)) -> accept logits (N,)`, the rows being those of the batch.
        config, threshold, sample: see `propose_for` and `gate.decide`.
        streamer: gets a token when it is accepted.
        output_rollout: also return the [`rollout.Rollout`].
        repeats: every so many consecutive rows share a prompt, which is read once.
        tree: judge up to `TREE_CANDIDATES` of a position in one forward, as the leaves of a tree, instead of one
            after the other. By default where at most `TREE_ROWS` rows are unfinished and the attention takes such a
            mask.

    Returns:
        [`ProxyGenerateOutput`]; `sequences` is `(batch, prompt length + longest response)`, padded on the right.

    Raises:
        `ValueError`: an LM with layers other than full attention.
    """
    text_config = lm.config.get_text_config()
    layers = set(getattr(text_config, "layer_types", None) or []) - {"full_attention"}
    if getattr(text_config, "sliding_window", None) and not getattr(text_config, "layer_types", None):
        layers = {"sliding_attention"}
    if layers:
        raise ValueError(
            f"Candidate features need full attention in every layer, {type(lm).__name__} has "
            f"{', '.join(sorted(layers))}: use features='prefix'."
        )
    attention_mask = model_kwargs.get("attention_mask")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if text_config._attn_implementation not in ("sdpa", "eager"):
        if tree:
            raise ValueError(
                f"`tree=True` needs attention that takes any mask (sdpa or eager), {type(lm).__name__} has "
                f"{text_config._attn_implementation}: leave it out."
            )
        tree = False
    options = (generation_config, config, streamer, tree)
    loop = _CandidateLoop(lm, input_ids, logits_processor, stopping_criteria, *options)
    keep_logits = {"logits_to_keep": 1} if "logits_to_keep" in model_kwargs else {}
    loop.prefill(input_ids, attention_mask, repeats, keep_logits)
    while len(loop.active.rows):
        loop.offer(judge, threshold, sample, keep_hidden=output_rollout)
    if streamer is not None:
        streamer.end()
    decisions = Decisions(
        tokens=loop.tokens,
        proposals=loop.tokens + loop.rejections,
        accepts=loop.tokens - loop.forced,
        forced=loop.forced,
        rank_sum=loop.rejections,
        lm_forwards=loop.forwards,
    )
    return ProxyGenerateOutput(
        sequences=loop.sequences[:, : loop.prompt_width + int(loop.tokens.max())],
        decisions=decisions,
        rollout=record_events(loop.events, loop.token_log_probs) if output_rollout else None,
    )
