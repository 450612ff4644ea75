"""Decoding with candidate features: a proposal is fed to the LM before it is judged, in a separate loop.

The loop is plugged into transformers' `generate` through `custom_generate`. It knows token ids, a model and a gate,
but no rewards or training.
"""

import functools
from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..core.config import ProxyConfig
from ..core.rollout import Decisions, record_candidate_decisions
from .candidate_loop import CandidateLoop
from .hidden_states import parameters_of, without_peft
from .options import GatedCall, ProxyGenerateOutput
from .prefix_cache import has_usual_positions, takes_positions


def generate_by_candidate(lm, call: GatedCall) -> ProxyGenerateOutput:
    """The LM's `generate` with the loop [`candidate_decode`]."""
    input_ids = call.rows
    loop = functools.partial(
        candidate_decode,
        judge=call.proxy.accept_logits,
        config=call.config,
        threshold=call.threshold,
        sample=call.sample,
        output_rollout=call.output_rollout,
        repeats=call.repeats,
        tree=call.tree,
        # `generate` does not pass the streamer on.
        streamer=call.streamer,
    )
    if call.streamer is not None:
        call.streamer.put(input_ids.cpu())
    return lm.generate(
        input_ids,
        call.generation_config,
        logits_processor=call.processors,
        stopping_criteria=call.criteria,
        custom_generate=loop,
        **call.options,
    )


@torch.no_grad()
def check_overwritable(lm) -> None:
    """`ValueError` unless a rejected token leaves no trace when another is written to its place in the cache. Every
    layer must keep the keys and values of all tokens, and each token be given its position. A few tokens are read."""
    name, remedy = type(without_peft(lm)).__name__, "use features='prefix'"
    ids = torch.tensor([[3, 4, 5]], device=lm.device)
    kinds = {"a cache of its own"}
    if "past_key_values" in parameters_of(lm) and lm._supports_default_dynamic_cache():
        cache = DynamicCache(config=lm.config.get_text_config(decoder=True))
        kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
        if not kinds:
            lm(input_ids=ids, past_key_values=cache, use_cache=True)
            if {layer.get_seq_length() for layer in cache.layers} != {
                ids.shape[1]
            }:  # ignored, or more tokens than ours
                kinds = {"a cache of its own"}
    if kinds:
        raise ValueError(
            f"Candidate features need full attention in every layer, {name} has {', '.join(sorted(kinds))}: {remedy}."
        )
    if takes_positions(lm):
        return
    # An LM that is not told positions may find them in the attention mask, or need none.
    padded = torch.nn.functional.pad(ids, (8, 0))
    alone, after = (lm(input_ids=x, attention_mask=(x > 0).long()).logits[0, -1].float() for x in (ids, padded))
    reads_alike = (alone - after).abs().max() < 0.05 * (alone.max() - alone.min())
    if not (has_usual_positions(lm) and reads_alike):
        raise ValueError(
            f"Candidate features need to give each token its position, {name} counts by itself: {remedy}."
        )


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

    The rows are independent: in one forward some rows advance to the next position while others retry theirs. With few
    rows, several candidates of a position are fed at once, and none sees the others. The gate decides after the LM's
    body and before its head. The head runs only for the accepted tokens.

    Args:
        input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: as transformers' `generate`
            passes them to a `custom_generate` function.
        judge: `(hidden (N, d), rows (N,)) -> accept logits (N,)`; `rows` are indices in the batch.
        config, threshold, sample: see `propose_for` and `gate.decide`.
        streamer: gets a token when it is accepted.
        output_rollout: also return the [`rollout.Rollout`].
        repeats: how many consecutive rows share a prompt, which is read once.
        tree: judge up to `TREE_CANDIDATES` of a position in one forward, as the leaves of a tree, instead of one
            after the other. The default is True if at most `TREE_ROWS` rows are unfinished and the attention takes
            such a mask.

    Returns:
        [`ProxyGenerateOutput`]; `sequences` is `(batch, prompt length + longest response)`, padded on the right.

    Raises:
        `ValueError`: a tree where the attention does not take its mask.
    """
    attention_mask = model_kwargs.get("attention_mask")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    text_config = lm.config.get_text_config()
    if text_config._attn_implementation not in ("sdpa", "eager"):
        if tree:
            raise ValueError(
                f"`tree=True` needs attention that takes any mask (sdpa or eager), {type(lm).__name__} has "
                f"{text_config._attn_implementation}: leave it out."
            )
        tree = False
    options = (generation_config, config, streamer, tree)
    loop = CandidateLoop(lm, input_ids, logits_processor, stopping_criteria, *options)
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
        rollout=record_candidate_decisions(loop.events, loop.token_log_probs) if output_rollout else None,
    )
