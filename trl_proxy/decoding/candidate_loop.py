"""The loop of candidate features: every row feeds its own next candidates to the LM, and keeps or overwrites them."""

from typing import NamedTuple

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from ..core.candidates import Candidates, propose_for
from ..core.features import places_of, state_size
from ..core.gate import decide
from ..core.rollout import CandidateDecisions
from .hidden_states import HiddenStateHook
from .pooling import running_sums, with_mean
from .row_cache import RowCache

# With at most this many unfinished rows, the next candidates of a position are judged in one forward. A few more
# tokens are nearly free if a forward mostly reads the LM's weights. On a CPU this is true in bfloat16: at batch 1, 4
# tokens cost 1.1 times as much as one token, but 1.4 times in float32 (docs/log.md).
TREE_ROWS = {("cpu", torch.bfloat16): 4, ("cpu", torch.float32): 0}
TREE_ROWS_ELSEWHERE = 2
TREE_CANDIDATES = 4  # more are rarely reached, and each makes the forward more expensive


class _Active(NamedTuple):
    """The A rows that are not finished."""

    rows: torch.Tensor  # (A,) index in the batch
    length: torch.Tensor  # (A,) accepted tokens
    prompt_lengths: torch.Tensor  # (A,) without padding
    visible: torch.Tensor  # (A, slots) 0/1, those that attention sees
    rank: torch.Tensor  # (A,) which candidate is on offer
    token_ids: torch.Tensor  # (A, K) candidates
    log_probs: torch.Tensor  # (A, K)
    last: torch.Tensor  # (A,) rank of the last candidate
    waiting: torch.Tensor  # (A,) bool: has accepted the token of this step, see `CandidateLoop.in_step`
    ended: torch.Tensor  # (A,) bool

    def select(self, keep: torch.Tensor) -> "_Active":
        return _Active(*(x[keep] for x in self))

    def at_rank(self, values: torch.Tensor) -> torch.Tensor:
        return values.gather(-1, self.rank[:, None])[:, 0]


class CandidateLoop:
    """The state of [`candidate_decode`], in order of use: prefill, then offers until all rows end.

    A row that has accepted a token goes on at once. If there are logits processors, stopping criteria or a streamer,
    it waits for the others (`in_step`): these see all rows at every step, as in transformers' own loop. A waiting row
    feeds its accepted token once more, which changes nothing.

    Off the CPU all shapes follow from the number of active rows. Only `_settle` waits for the device: it reads what
    the next forward needs to know of the rows.
    """

    def __init__(self, lm, input_ids, processors, criteria, generation_config, config, streamer, tree):
        self.lm, self.config, self.streamer, self.tree = lm, config, streamer, tree
        self.processors = processors
        # The loop itself ends rows by length and EOS.
        self.criteria = StoppingCriteriaList(
            c for c in criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))
        )
        self.in_step = bool(processors or self.criteria or streamer is not None)
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
        self.cache = RowCache.for_lm(self.lm, self.prompt_width, slots)
        with HiddenStateHook(self.lm, self.config.feature_layers, device=self.device) as states:
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
            total, _ = running_sums(states.hidden, attention_mask[::repeats])
            self.total = total[:, -1].repeat_interleave(repeats, dim=0)
        # Decisions of no rows, so that a batch without any decision has a record of the right shapes.
        none, state = input_ids.new_zeros(0), states.state.new_zeros(0, state_size(self.config))
        self.events = [CandidateDecisions(none.bool(), none, state, none, none, none.bool(), none.float())]
        logits = output.logits[:, -1].to(self.device)
        if repeats > 1:
            self.cache.select_rows(rows // repeats)
            logits = logits.repeat_interleave(repeats, dim=0)
        self.forwards += 1
        zeros = torch.zeros_like(rows)
        visible = self.sequences.new_zeros(self.batch, slots)
        visible[:, : self.prompt_width] = attention_mask
        if self.in_step:
            self.steps, self.next_logits = 0, logits.float()
        candidates = self._propose(logits)
        last, no = candidates.counts - 1, torch.zeros_like(rows, dtype=torch.bool)
        lengths = attention_mask.sum(-1)
        self.active = _Active(rows, zeros, lengths, visible, zeros, *candidates[:2], last=last, waiting=no, ended=no)
        self._settle()

    def offer(self, judge, threshold: float, sample: bool, keep_hidden: bool) -> None:
        """Offers each active row its next candidate, or its next few as a tree, in one forward of the LM."""
        active = self.active
        rows = torch.arange(len(active.rows), device=self.device)
        n = min(self.most_left + 1, TREE_CANDIDATES) if self._as_tree() else 1
        ranks = active.rank[:, None] + torch.arange(n, device=self.device)  # (A, n)
        tokens = active.token_ids.gather(1, torch.minimum(ranks, active.last[:, None]))
        waiting = active.waiting[:, None]
        asked = (ranks < active.last[:, None]) & ~waiting
        accept = (ranks == active.last[:, None]) | waiting
        first = head = state = rows  # set in `select`

        def select(hidden: torch.Tensor) -> torch.Tensor:
            """Decides before the LM's head, which runs only for rows that need new candidates."""
            nonlocal accept, first, head, state
            places = places_of(asked.flatten())
            if len(places):
                state = self._state(states.hidden).flatten(0, 1)
                decisions = decide(judge(state[places], active.rows[places // n]), threshold, sample)
                decisions = accept.flatten().index_copy(0, places, decisions).view_as(accept)
                accept = torch.where(asked, decisions, accept)
            first = accept.long().argmax(-1)
            head = places_of(self._needs_candidates(tokens, accept, first))
            return hidden.flatten(0, 1)[(rows * n + first)[head].to(hidden.device)]

        slots = self.prompt_width + active.length
        visible = active.visible.scatter(1, slots[:, None], 1)
        width = self.cache.set_write_positions(slots, n, *self.span)
        with HiddenStateHook(self.lm, self.config.feature_layers, select, device=self.device) as states:
            output = self.lm(
                input_ids=tokens,
                attention_mask=visible[:, :width] if n == 1 else self._tree_mask(active.visible[:, :width]),
                position_ids=(active.prompt_lengths + active.length)[:, None].expand(-1, n),
                past_key_values=self.cache,
                use_cache=True,
            )
        taken = accept.any(-1) & ~active.waiting
        self.forwards[active.rows] += (~active.waiting).long()
        self.rejections[active.rows] += torch.where(taken | active.waiting, first, n)
        if keep_hidden:
            self._record(state, tokens, ranks, asked, accept, first)
        if self.config.pooled_features:
            self.total[active.rows] += torch.where(taken[:, None], states.hidden[rows, first].float(), 0.0)
        if n > 1:
            moved = places_of(taken & (first > 0))
            source = slots + torch.where(taken, first, 0)
            self.cache.move(moved, source[moved], slots[moved])
        self.active = active._replace(rank=active.rank + first, visible=visible)
        logits = output.logits.flatten(0, -2).to(self.device)
        self._advance(tokens[rows, first], taken, n, head, logits)
        self._settle()

    def _needs_candidates(self, tokens, accept, first) -> torch.Tensor:
        """`(A,)` bool: whether a row has accepted its token just now, and goes on after it."""
        # (3) EOS: a row whose accepted token is final gets no new candidates.
        token = tokens.gather(1, first[:, None])[:, 0]
        return accept.any(-1) & ~self._is_final(token) & ~self.active.waiting

    def _record(self, state, tokens, ranks, asked, accept, first) -> None:
        """Keeps the decisions of this forward, `(A, n)` each, up to the first that accepts."""
        active = self.active
        decided = asked & ((ranks - active.rank[:, None] <= first[:, None]) | ~accept.any(-1, keepdim=True))
        places = places_of(decided.flatten())
        if not len(places):
            return
        # (1) Forced last candidate: a position's last decision accepts, or rejects all but the last candidate. The
        # last one is then accepted, so its log-probability is recorded.
        to_last = ~accept & (ranks + 1 == active.last[:, None])
        log_probs = active.log_probs.gather(1, (ranks + to_last).clamp(max=active.log_probs.shape[1] - 1))
        log_probs = torch.where(accept | to_last, log_probs, 0.0)
        of_row = (x[:, None].expand_as(ranks) for x in (active.rows, active.length))
        mask, row, length, *rest = (x.flatten()[places] for x in (decided, *of_row, tokens, accept, log_probs))
        self.events.append(CandidateDecisions(mask, row, state[places], length, *rest))

    def _advance(self, token, taken, n: int, head, logits) -> None:
        """Moves every row on: to its next position if it took this token just now, else to its next candidates.
        `logits` `(N, vocab)` are those of the active rows `head`."""
        active = self.active
        forced, final = active.rank == active.last, self._is_final(token)
        going = (taken & ~final)[head, None]
        if self.in_step:
            rows = active.rows[head]
            self.next_logits[rows] = torch.where(going, logits.float(), self.next_logits[rows])
            rank = torch.where(taken | active.waiting, active.rank, active.rank + n)
            self.active = active._replace(rank=rank, waiting=active.waiting | taken)
            return
        self._accept(taken, token, forced)
        rank, ended = torch.where(taken, 0, active.rank + n), active.ended | (taken & final)
        self.active = active = self.active._replace(rank=rank, ended=ended)
        if len(head):
            new = self._propose(logits)
            formed = (new.token_ids, new.log_probs, (new.counts - 1)[:, None])
            before = (active.token_ids, active.log_probs, active.last[:, None])
            token_ids, log_probs, last = (
                old.index_copy(0, head, torch.where(going, x, old[head])) for x, old in zip(formed, before)
            )
            self.active = active._replace(token_ids=token_ids, log_probs=log_probs, last=last[:, 0])

    def _settle(self) -> None:
        """Ends what has ended, and reads from the device what the next forward needs to know of the rows."""
        # A forced token that ends its response needs no forward, as in plain decoding.
        active = self.active
        token, forced = active.at_rank(active.token_ids), active.rank == active.last
        over = forced & self._is_final(token) & ~active.ended
        if self.in_step:
            self.active = active._replace(waiting=active.waiting | over)
        else:
            self._accept(over, token, forced)
            self.active = self.active._replace(ended=active.ended | over)
        active = self.active
        left = torch.where(active.waiting, 0, active.last - active.rank)
        read = torch.stack([active.ended.long(), active.waiting.long(), active.length, left], 1).tolist()
        keep = [i for i, (ended, *_) in enumerate(read) if not ended]
        if len(keep) < len(read):
            self._keep(torch.tensor(keep, dtype=torch.long, device=self.device))
        if not keep:
            return
        _, waits, lengths, left = zip(*(read[i] for i in keep))
        self.span = self.prompt_width + min(lengths), self.prompt_width + max(lengths)
        self.most_left = max(left)
        if self.in_step and all(waits):
            self._finish_step()
            self._settle()

    def _finish_step(self) -> None:
        """All rows have accepted a token: the streamer and the criteria see it, and new candidates are formed."""
        active = self.active
        token, forced = active.at_rank(active.token_ids), active.rank == active.last
        ended = self._is_final(token)
        self._accept(torch.ones_like(ended), token, forced)
        self.steps += 1
        ids = self.sequences[:, : self.prompt_width + self.steps]
        if self.criteria:
            ended = ended | self.criteria(ids, None)[active.rows]
        if self.streamer is not None:
            self.streamer.put(ids[:, -1].cpu())
        if ended.all():  # the processors are not called for rows that have ended
            self._keep(ended.new_zeros(0, dtype=torch.long))
            return
        new = self._propose(self.next_logits, ids)
        token_ids, log_probs, last = (x[active.rows] for x in (new.token_ids, new.log_probs, new.counts - 1))
        begun = {"rank": torch.zeros_like(last), "waiting": torch.zeros_like(ended), "ended": ended}
        self.active = self.active._replace(token_ids=token_ids, log_probs=log_probs, last=last, **begun)

    def _state(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the gate reads of the candidates just fed, `(A, n, state_size)`: their states. With pooled features,
        each is followed by the mean of the states up to and including it."""
        if not self.config.pooled_features:
            return hidden
        total = self.total[self.active.rows, None] + hidden.float()
        count = self.active.prompt_lengths + self.active.length + 1
        return with_mean(hidden, total, count[:, None, None])

    def _is_final(self, token: torch.Tensor) -> torch.Tensor:
        """`(A,)` bool: whether accepting this token ends the row."""
        return torch.isin(token, self.eos) | (self.active.length + 1 >= self.max_new_tokens)

    def _as_tree(self) -> bool:
        if self.tree is not None:
            return self.tree
        return len(self.active.rows) <= TREE_ROWS.get((self.device.type, self.lm.dtype), TREE_ROWS_ELSEWHERE)

    def _tree_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """The additive attention mask, `(A, 1, n, width)`: a candidate sees the accepted tokens and itself."""
        slots = self.cache.slots  # (A, n)
        accepted = visible.scatter(1, slots, 0)[:, None].repeat(1, slots.shape[1], 1)
        seen = accepted.scatter(2, slots[..., None], 1)[:, None].to(self.lm.dtype)
        return (1 - seen) * torch.finfo(self.lm.dtype).min

    def _accept(self, which: torch.Tensor, token: torch.Tensor, forced: torch.Tensor) -> None:
        """Appends `token` `(A,)` to the active rows where `which` is True."""
        active = self.active
        rows, place = active.rows, (self.prompt_width + active.length).clamp(max=self.capacity - 1)
        self.sequences[rows, place] = torch.where(which, token, self.sequences[rows, place])
        self.tokens[rows] += which.long()
        self.forced[rows] += (forced & which).long()
        self.token_log_probs[rows] += torch.where(which, active.at_rank(active.log_probs), 0.0)
        self.active = active._replace(length=active.length + which.long())

    def _keep(self, keep: torch.Tensor) -> None:
        """Removes all other rows from the batch and the cache."""
        self.active = self.active.select(keep)
        if len(keep):
            self.cache.select_rows(keep)

    def _propose(self, logits: torch.Tensor, ids: torch.Tensor | None = None) -> Candidates:
        """Candidates from logits `(rows, vocab)`; the processors see those of all rows, after `ids`."""
        if self.processors:
            ids = self.sequences[:, : self.prompt_width] if ids is None else ids
            logits = self.processors(ids, logits.float())
        return propose_for(self.config, logits)
