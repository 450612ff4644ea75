"""The decision process of Proxy-RLHF as slowly and plainly as it can be written, to compare fast code with.

One row at a time, without padding and without a cache: for every proposal the whole sequence runs through the plain
LM, and the gate is asked about that one proposal. Candidates are formed by sorting the whole vocabulary. Nothing of
`trl_proxy` is used but the parameters of the model's gate, and how many candidates a tree takes, to count forwards.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F

from trl_proxy.decoding.candidate_loop import TREE_CANDIDATES


@dataclass
class Decision:
    """A candidate about which the gate was asked."""

    token_id: int
    accept: bool
    hidden: torch.Tensor  # (hidden_size,)
    position: int  # of the token in the response
    scalars: list[float]  # log-prob, gap, rank, count, position as the gate reads them; zeros for candidate features
    lm_log_prob: float = 0.0  # of the token accepted at this position, at the position's last decision


@dataclass
class Row:
    """What happened in one row; the counts are those of `trl_proxy.core.rollout.Decisions`."""

    tokens: list[int] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    proposals: int = 0
    accepts: int = 0
    forced: int = 0
    rank_sum: int = 0
    lm_forwards: int = 0
    token_log_prob: float = 0.0
    margin: float = math.inf  # how close the closest call was; below float32's error another outcome is no fault

    def counts(self) -> tuple[int, ...]:
        return len(self.tokens), self.proposals, self.accepts, self.forced, self.rank_sum, self.lm_forwards


def form_candidates(logits: torch.Tensor, config) -> tuple[list[int], list[float], float]:
    """Ids and log-probs of the proposals of one position, `logits` being `(vocab,)`, and the margin of the choice."""
    values = [value / config.temperature for value in logits.double().tolist()]
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    top = values[order[0]]
    log_total = top + math.log(sum(math.exp(value - top) for value in values if value > -math.inf))
    log_probs = {token: values[token] - log_total for token in order}
    floor = math.log(config.p_t) + (log_probs[order[0]] if config.p_t_mode == "relative" else 0.0)
    offered = [t for t in order if log_probs[t] >= floor and values[t] > -math.inf][: config.max_candidates]
    offered = offered or order[:1]

    around = order[: len(offered) + 1]
    gaps = [values[a] - values[b] for a, b in pairwise(around)]
    floor_gaps = [abs(log_probs[token] - floor) for token in around[1:]]
    return offered, [log_probs[token] for token in offered], min([math.inf, *gaps, *floor_gaps])


def gate_logit(gate, parts, scalars=()) -> float:
    """LayerNorm of each part, standardised, linear layers with ReLU between them, by hand."""
    x = torch.cat([F.layer_norm(part.float(), part.shape) for part in parts])
    x = torch.cat([(x - gate.feature_mean) / gate.feature_std, torch.tensor(scalars, dtype=torch.float32)])
    linear = [layer for layer in gate.mlp if isinstance(layer, torch.nn.Linear)]
    for layer in linear[:-1]:
        x = (layer.weight @ x + layer.bias).clamp(min=0.0)
    return (linear[-1].weight[0] @ x + linear[-1].bias[0]).item()


def run_lm(lm, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token logits `(vocab,)` after `ids`, and the last hidden states `(len(ids), hidden_size)`."""
    output = lm(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return output.logits[0, -1].float(), output.hidden_states[-1][0]


def read_states(lm, ids: list[int], config) -> list[torch.Tensor]:
    """The parts of what the gate reads of the LM after `ids`: each layer's last state, then each layer's mean."""
    hidden = lm(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    states = [hidden[layer][0] for layer in config.feature_layers]
    means = [x.mean(0) for x in states] if config.pooled_features else []
    return [x[-1] for x in states] + means


@torch.no_grad()
def decode(
    model,
    input_ids,
    attention_mask,
    max_new_tokens: int,
    eos_token_ids=(2,),
    threshold: float | None = None,
    logits_processor=None,
    stop=None,
    replay: list[list[bool]] | None = None,
    tree: bool = False,
) -> list[Row]:
    """All rows of a batch.

    Args:
        logits_processor: `(ids (1, n), logits (1, vocab)) -> logits`; sees prompt and response without padding.
        stop: `ids (n,) -> bool`, a stopping criterion besides the end-of-sequence tokens.
        replay: the decisions of every row in order, in place of greedy ones.
        tree: count the LM's forwards as if `TREE_CANDIDATES` of a position were fed at once.
    """
    rows = []
    for i in range(len(input_ids)):
        prompt = input_ids[i][attention_mask[i].bool()].tolist()
        script = None if replay is None else iter(replay[i])
        rows.append(
            _decode_row(model, prompt, max_new_tokens, eos_token_ids, threshold, logits_processor, stop, script, tree)
        )
        assert script is None or next(script, None) is None, "the fast path took more decisions"
    return rows


def _decode_row(model, prompt, max_new_tokens, eos_token_ids, threshold, logits_processor, stop, script, tree) -> Row:
    config, lm, gate, row = model.proxy_config, model.lm, model.gate, Row()
    embeddings = lm.get_input_embeddings().weight
    threshold = config.threshold if threshold is None else threshold
    ended, fed = False, 0
    while not ended and len(row.tokens) < max_new_tokens:
        before = prompt + row.tokens
        logits, _ = run_lm(lm, before)
        if logits_processor is not None:
            logits = logits_processor(torch.tensor([before]), logits[None])[0]
        token_ids, log_probs, margin = form_candidates(logits, config)
        row.margin = min(row.margin, margin)
        asked = []
        for rank, token in enumerate(token_ids):
            row.proposals += 1
            if rank == len(token_ids) - 1:
                row.forced += 1
                break
            if config.features == "candidate":
                scalars = [0.0] * 5
                state = read_states(lm, [*before, token], config)
                logit = gate_logit(gate, state)
            else:
                log_prob, gap = log_probs[rank], log_probs[0] - log_probs[rank]
                position = min(len(before), 1024)
                scalars = [max(log_prob, -20.0) / 4, gap / 4, rank / 16, len(token_ids) / 16, position / 128]
                state = read_states(lm, before, config)
                logit = gate_logit(gate, [*state, embeddings[token]], scalars)
            if script is None:
                accept = logit >= threshold
                row.margin = min(row.margin, abs(logit - threshold))
            else:
                accept = next(script)
            asked.append(Decision(token, accept, torch.cat(state), len(row.tokens), scalars))
            if accept:
                row.accepts += 1
                break
        if asked:
            asked[-1].lm_log_prob = log_probs[rank]
        row.decisions += asked
        row.rank_sum += rank
        fed += rank // TREE_CANDIDATES + 1
        row.tokens.append(token)
        row.token_log_prob += log_probs[rank]
        ended = token in eos_token_ids or (stop is not None and stop(torch.tensor([*before, token])))
        final_is_forced = rank == len(token_ids) - 1 and (token in eos_token_ids or len(row.tokens) == max_new_tokens)
    # Candidate features: the prompt, and every proposal (as a tree: every few) but a forced one after which
    # nothing follows. Prefix features: one forward per token.
    if config.features == "candidate" and tree:
        row.lm_forwards = 1 + fed - (final_is_forced and rank % TREE_CANDIDATES == 0)
    elif config.features == "candidate":
        row.lm_forwards = 1 + row.proposals - final_is_forced
    else:
        row.lm_forwards = len(row.tokens)
    return row


def check_output(output, rows: list[Row], prompt_width: int, pad_token_id: int, eos_token_ids=(2,)) -> None:
    """Asserts that a `ProxyGenerateOutput` with a rollout tells the same story as the brute force's rows."""
    width = max(len(row.tokens) for row in rows)
    expected = [row.tokens + [pad_token_id] * (width - len(row.tokens)) for row in rows]
    assert output.sequences[:, prompt_width:].tolist() == expected
    assert list(zip(*(x.tolist() for x in output.decisions), strict=True)) == [row.counts() for row in rows]

    rollout = output.rollout
    assert rollout.mask.sum(-1).tolist() == [len(row.decisions) for row in rows]
    for i, row in enumerate(rows):
        n = len(row.decisions)
        assert rollout.mask[i].tolist() == [True] * n + [False] * (rollout.mask.shape[1] - n), "decisions come first"
        assert rollout.token_ids[i, :n].tolist() == [d.token_id for d in row.decisions]
        assert rollout.accept[i, :n].tolist() == [d.accept for d in row.decisions]
        assert rollout.positions[i, :n].tolist() == [d.position for d in row.decisions]
        if n:
            hidden = rollout.hidden[i, rollout.hidden_index[i, :n]]
            torch.testing.assert_close(hidden, torch.stack([d.hidden for d in row.decisions]), atol=1e-4, rtol=0)
            scalars = torch.tensor([d.scalars for d in row.decisions])
            torch.testing.assert_close(rollout.scalars[i, :n], scalars, atol=1e-4, rtol=0)
            log_probs = torch.tensor([d.lm_log_prob for d in row.decisions])
            torch.testing.assert_close(rollout.lm_log_probs[i, :n], log_probs, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            rollout.token_log_probs[i], torch.tensor(row.token_log_prob), atol=1e-3, rtol=0, check_dtype=False
        )
