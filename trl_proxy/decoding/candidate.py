"""Decoding with candidate features: a proposal is fed to the LM before it is judged, in a separate loop.

The loop is plugged into transformers' `generate` through `custom_generate`. It knows token ids, a model and a gate,
but no rewards or training.
"""

import copy
import functools
from collections.abc import Callable

import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..core.config import ProxyConfig
from ..core.rollout import Decisions, record_candidate_decisions
from .candidate_loop import CandidateLoop
from .hidden_states import execution_device, parameters_of, without_peft
from .options import GatedCall, ProxyGenerateOutput
from .row_cache import RowCache


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


def check_overwritable(lm) -> None:
    """`ValueError` unless a rejected token leaves no trace when another is written to its place in the cache: every
    layer keeps the keys and values of all tokens, and the rows of a batch can be at different positions."""
    name, remedy = type(without_peft(lm)).__name__, "use features='prefix'"
    kinds = {"a cache of its own"}
    if "past_key_values" in parameters_of(lm) and lm._supports_default_dynamic_cache():
        cache = DynamicCache(config=lm.config.get_text_config(decoder=True))
        kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
        if not kinds and not _fills(lm, cache):
            kinds = {"a cache of its own"}
    if kinds:
        raise ValueError(
            f"Candidate features need full attention in every layer, {name} has {', '.join(sorted(kinds))}: {remedy}."
        )
    if not _overwrites(lm):
        raise ValueError(
            f"Candidate features need to give each token its position, {name} counts by itself: {remedy}."
        )


@torch.no_grad()
def _fills(lm, cache: DynamicCache) -> bool:
    """Whether the LM keeps what it reads in this cache, and nothing else. Some ignore it, or add own tokens."""
    lm(input_ids=torch.tensor([[3, 4, 5]], device=execution_device(lm)), past_key_values=cache, use_cache=True)
    return {layer.get_seq_length() for layer in cache.layers} == {3}


@torch.no_grad()
def _overwrites(lm) -> bool:
    """Tries it. A prompt with padding must read as in `generate`. After `3 4 5 6` one row takes the 6 back and reads a
    7 in its place, the other reads the 7 next."""
    device = execution_device(lm)
    text = torch.tensor([[3, 4, 5, 6, 7]], device=device)
    cache = RowCache.for_lm(lm, prompt_width=3, capacity=5)
    seen = text.new_ones(2, 5)
    position = text.new_tensor([[0, 1, 2], [0, 1, 2]])

    def read(ids: torch.Tensor, width: int) -> torch.Tensor:
        options = {"position_ids": position, "past_key_values": cache, "use_cache": True}
        return lm(input_ids=ids.expand(2, -1), attention_mask=seen[:, :width], **options).logits[:, -1]

    read(text[:, :3], 3)
    position = text.new_tensor([[3], [3]])
    read(text[:, 3:4], cache.set_write_positions(position[:, 0], 1, 3, 3))
    position = text.new_tensor([[3], [4]])
    seen[0, 4] = 0
    found = read(text[:, 4:], cache.set_write_positions(position[:, 0], 1, 3, 4))
    plain = [lm(input_ids=ids).logits[0, -1] for ids in (torch.cat([text[:, :3], text[:, 4:]], 1), text)]
    padded = {"input_ids": text.new_tensor([[0, 0, 3, 4, 5]]), "attention_mask": text.new_tensor([[0, 0, 1, 1, 1]])}
    plain.append(_first_logits(without_peft(lm), padded))
    prompt = lm(**padded, position_ids=text.new_tensor([[0, 0, 0, 1, 2]])).logits[:, -1]
    found, wanted = (torch.stack([x.to(device) for x in logits]).float() for logits in ([*found, *prompt], plain))
    tolerance = (1e-3 if lm.dtype == torch.float32 else 5e-2) * (wanted.amax() - wanted.amin())
    return bool((found - wanted).abs().max() < tolerance)


def _first_logits(lm, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits `(vocab,)` from which `generate` takes the first token of one prompt."""
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    lm = copy.copy(lm)  # with the same weights
    lm.generation_config = GenerationConfig()  # its own may ask for beams, or for a tokenizer
    return lm.generate(**inputs, **options, pad_token_id=0).logits[0][0]


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
