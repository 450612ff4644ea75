"""Decoding with prefix features: the gate is the last logits processor of transformers' own `generate`."""

import functools
from collections.abc import Callable

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache
from transformers.utils import logging

from ..core.candidates import propose_for
from ..core.config import ProxyConfig
from ..core.features import accept_logits
from ..core.gate import accepted_rank, decide
from ..core.rollout import PrefixStep, record_prefix_steps
from .hidden_states import HiddenStateHook, input_embeddings, without_peft
from .options import GatedCall, ProxyGenerateOutput
from .pooling import PooledStateHook
from .prefix_cache import growing_cache, prefill, prefill_shared_prefix
from .settings import StopRecorder

logger = logging.get_logger(__name__)


class PrefixGate(LogitsProcessor):
    """The gate as the last logits processor: it leaves one token per row, the accepted candidate.

    Args:
        accept_logits: `(state (B, state_size), candidates (B, K), positions (B,)) -> (B, K)`.
        config: how candidates are formed.
        states: the hook that sees the state of the step.
        attention_mask: `(B, prompt length)` of the prompts.
        threshold, sample: see `gate.decide`.
        keep_hidden: keep what a [`rollout.Rollout`] needs.
    """

    def __init__(
        self,
        accept_logits: Callable,
        config: ProxyConfig,
        states: HiddenStateHook,
        attention_mask: torch.Tensor,
        threshold: float,
        sample: bool,
        keep_hidden: bool,
    ):
        self.accept_logits, self.config, self.states = accept_logits, config, states
        self.threshold, self.sample, self.keep_hidden = threshold, sample, keep_hidden
        self.prompt_width = attention_mask.shape[1]
        self.prompt_lengths = attention_mask.sum(-1)
        self.steps: list[PrefixStep] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        positions = self.prompt_lengths + (input_ids.shape[1] - self.prompt_width)
        state = self.states.read(input_ids.shape[1])
        candidates = propose_for(self.config, scores)
        # (1) Forced last candidate: `accepted_rank` takes it if all before it were rejected.
        accept = decide(self.accept_logits(state, candidates, positions), self.threshold, self.sample)
        rank = accepted_rank(accept, candidates.mask)
        self.steps.append(PrefixStep(candidates, rank, state if self.keep_hidden else None, positions))
        chosen = candidates.token_ids.gather(-1, rank[:, None])
        # A new tensor: `output_logits` returns the one that came in.
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


def generate_by_prefix(lm, call: GatedCall) -> ProxyGenerateOutput:
    """transformers' own `generate`, with the gate as its last logits processor."""
    config, input_ids, attention_mask = call.config, call.rows, call.options["attention_mask"]
    cache = call.options.get("past_key_values")
    if config.pooled_features and cache is not None and cache.get_seq_length():
        raise ValueError(
            "A proxy with `pooled_features=True` needs the whole prompt: pass no filled `past_key_values`."
        )
    stops = StopRecorder(call.criteria)
    hook: HiddenStateHook = HiddenStateHook(lm, config.feature_layers, device=input_ids.device)
    if config.pooled_features:
        hook = PooledStateHook(lm, config.feature_layers, attention_mask)
    with hook as states:
        if not call.settings.has_own_cache and (cache := _prefilled(lm, call, states)) is not None:
            call.options["past_key_values"] = cache
        logits = functools.partial(accept_logits, call.proxy, input_embeddings(lm))
        gate = PrefixGate(logits, config, states, attention_mask, call.threshold, call.sample, call.output_rollout)
        output = lm.generate(
            input_ids,
            call.generation_config,
            logits_processor=LogitsProcessorList([*call.processors, gate]),
            stopping_criteria=[stops] if call.criteria else None,
            streamer=call.streamer,
            **call.options,
        )
    if not call.return_dict:
        return output
    # (3) EOS: a row that an EOS id or a stopping criterion has ended makes no decision afterwards.
    eos = torch.tensor(call.settings.eos_token_ids, dtype=torch.long, device=input_ids.device)
    decisions, rollout = record_prefix_steps(gate.steps, output.sequences[:, input_ids.shape[1] :], eos, stops.stopped)
    return ProxyGenerateOutput(**output, decisions=decisions, rollout=rollout)


def _prefilled(lm, call: GatedCall, states: HiddenStateHook) -> Cache | None:
    """A cache for all rows of the batch that has read each distinct prompt once, or their shared prefix."""
    if call.repeats > 1:
        cache = prefill(lm, call.input_ids, call.attention_mask, states)
        if cache is None:
            name = type(without_peft(lm)).__name__
            logger.warning_once(f"{name} cannot share what it has read: each sequence reads its prompt.")
            return None
        cache.batch_repeat_interleave(call.repeats)
        return cache
    # A forward of another shape rounds differently, which shows in bfloat16. The caller may also want the states of
    # the whole prompt.
    if lm.dtype != torch.float32 or call.settings["output_hidden_states"] or call.settings["output_attentions"]:
        return growing_cache(lm)
    return prefill_shared_prefix(lm, call.input_ids, call.attention_mask, states)
