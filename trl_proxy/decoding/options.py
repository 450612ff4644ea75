"""Options and output of a gated `generate`: a call is checked and parsed here before it is decoded."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

from ..core.config import ProxyConfig
from ..core.rollout import Decisions, Rollout
from ..prompts import check_room, positions_of
from .settings import REFUSED, TRUNCATIONS

logger = logging.get_logger(__name__)

# Options of `generate` that decoding by decisions cannot follow, whoever sets them. Beams and assisted generation
# decode by the closed form.
NOT_GATED = ("guidance_scale", "penalty_alpha", "dola_layers", "watermarking_config", "token_healing", "use_mtp")


@dataclass
class ProxyGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns: transformers' fields and the record of decisions."""

    decisions: Decisions | None = None
    rollout: Rollout | None = None


class Settings:
    """Options of `generate` by name: the call's value, even None, else the first one set in a configuration.

    Args:
        kwargs: of the call.
        configs: the call's generation configuration and the model's.
    """

    def __init__(self, kwargs: dict, *configs):
        self.kwargs, self.configs = kwargs, [config for config in configs if config is not None]

    def __getitem__(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        return next((x for config in self.configs if (x := getattr(config, name, None)) is not None), None)

    @property
    def eos_token_ids(self) -> list[int]:
        ids = self["eos_token_id"]
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def is_assisted(self) -> bool:
        return self["assistant_model"] is not None or bool(self["prompt_lookup_num_tokens"])

    @property
    def has_own_cache(self) -> bool:
        """Whether the caller has chosen a cache, or none."""
        cache = self["past_key_values"] is not None or self["cache_implementation"] is not None
        return cache or self["use_cache"] is False


@dataclass
class GatedCall:
    """A call of `generate` that decodes by the gate's decisions.

    Attributes:
        input_ids, attention_mask: `(batch, prompt length)`, each distinct prompt once.
        repeats: how often each is decoded.
        proxy: `proxies.Proxy`, or several as one.
        config: the proxy's, with the call's temperature.
        threshold, sample: see `gate.decide`.
        output_rollout: whether to keep what training needs.
        return_dict: whether the record of decisions is returned.
        tree: see `candidate_decode`.
        settings: the options that were asked for.
        generation_config, options: for `generate` of the LM.
        processors, criteria, streamer: the caller's.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    repeats: int
    proxy: Any
    config: ProxyConfig
    threshold: float
    sample: bool
    output_rollout: bool
    return_dict: bool
    tree: bool | None
    settings: Settings
    generation_config: Any
    options: dict[str, Any]
    processors: LogitsProcessorList
    criteria: list[StoppingCriteria]
    streamer: Any

    @property
    def rows(self) -> torch.Tensor:
        """The prompts, repeated; `options` have their mask."""
        return self.input_ids.repeat_interleave(self.repeats, dim=0)


def read_call(
    prompts: tuple[torch.Tensor, torch.Tensor],
    proxy,
    settings: Settings,
    generation_config,
    kwargs: dict,
    *,
    sample: bool,
    threshold: float | None,
    output_rollout: bool,
    tree: bool | None,
    logits_processor,
    streamer,
) -> GatedCall:
    """Parses a call; `kwargs` are its remaining options, for `generate` of transformers."""
    config = proxy.config
    if kwargs.get("temperature") is not None:
        config = dataclasses.replace(config, temperature=kwargs["temperature"])
    criteria = list(kwargs.pop("stopping_criteria", None) or [])
    if settings["stop_strings"] is not None:
        if kwargs.get("tokenizer") is None:
            raise ValueError("`stop_strings` need the tokenizer: pass `tokenizer=...` to `generate`.")
        criteria.append(StopStringCriteria(kwargs.pop("tokenizer"), settings["stop_strings"]))
    return_dict = kwargs.pop("return_dict_in_generate", False) or output_rollout
    repeats = settings["num_return_sequences"] or 1
    options = {
        **{name: value for name, value in kwargs.items() if name not in TRUNCATIONS},
        # `argmax` takes the one token per row that the gate leaves. The values are transformers' defaults.
        "do_sample": False,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "attention_mask": prompts[1].repeat_interleave(repeats, dim=0),
        "return_dict_in_generate": True,
        # Done here: prompts are repeated, and the criteria include the stop strings.
        "num_return_sequences": 1,
        "stop_strings": None,
    }
    generation_config, options = merged(generation_config, options)
    return GatedCall(
        *prompts,
        repeats=repeats,
        proxy=proxy,
        config=config,
        threshold=config.threshold if threshold is None else threshold,
        sample=sample,
        output_rollout=output_rollout,
        return_dict=return_dict,
        tree=tree,
        settings=settings,
        generation_config=generation_config,
        options=options,
        processors=LogitsProcessorList(logits_processor or []),
        criteria=criteria,
        streamer=streamer,
    )


def checked_prompts(lm_config, input_ids, attention_mask, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and their mask, `(batch, prompt length)` each; `ValueError` if nothing can be decoded from them."""
    if input_ids is None:
        raise ValueError("`generate` needs `input_ids`: a gated LM decodes from tokens, not from embeddings.")
    if attention_mask is None:
        # As transformers infers it from the prompts.
        pad = settings["pad_token_id"]
        known = pad is not None and pad not in settings.eos_token_ids
        attention_mask = (input_ids != pad).long() if known else torch.ones_like(input_ids)
    if (attention_mask[:, -1] == 0).any():
        raise ValueError("The prompts are padded on the right: set `tokenizer.padding_side = 'left'`.")
    width = input_ids.shape[1]
    # 20 new tokens are transformers' own default.
    new_tokens = settings["max_new_tokens"] or (settings["max_length"] or width + 20) - width
    check_room(width, new_tokens, positions_of(lm_config))
    return input_ids, attention_mask


def refuse_what_has_no_meaning(settings: Settings, gate_sample: bool) -> None:
    """`ValueError` for the options of `generate` that a gate cannot follow; a warning for those that do not apply."""
    for name in NOT_GATED:
        neutral, reason = REFUSED[name]
        if settings[name] not in neutral:
            raise ValueError(f"`{name}` is not supported: {reason}; set it to {neutral[-1]}.")
    if ignored := [name for name in TRUNCATIONS if settings.kwargs.get(name) is not None]:
        logger.warning_once(f"{', '.join(ignored)} do not apply to a gated LM: set `p_t` and `max_candidates`.")
    if settings.kwargs.get("do_sample") and not gate_sample:
        logger.warning_once(
            "`do_sample=True` does not apply to a gated LM: `gate_sample=True` draws the gate's decisions. A "
            "`temperature`, as a pipeline adds to it, is that of the LM's proposals."
        )


def check_closed_form(config: ProxyConfig, assisted: bool, gate_sample: bool, by_decision: list[str]) -> None:
    """`ValueError` if beams or assisted generation cannot use the logits of `forward`, or have options that need
    decisions."""
    if config.features == "candidate":
        raise ValueError(
            "`num_beams` and assisted generation need a proxy with features='prefix': leave them out (`num_beams=1`)."
        )
    if by_decision:
        raise ValueError(
            "`num_beams` and assisted generation use the distribution of the next token, not decisions: leave "
            f"out {', '.join(f'`{name}`' for name in by_decision)}."
        )
    if assisted and not gate_sample:
        raise ValueError("Assisted generation draws its tokens: pass `gate_sample=True`.")
    if not assisted and (gate_sample or config.proposal == "sampled"):
        raise ValueError(
            "Beam search looks for the most probable response: leave out `gate_sample`, and let `proposal` "
            "of the proxy be 'ranked'."
        )


def merged(generation_config, options: dict) -> tuple[Any, dict]:
    """A copy of the caller's generation configuration with these options, and the options that it does not have.
    Without a configuration: None and all options."""
    if generation_config is None:
        return None, options
    generation_config = copy.deepcopy(generation_config)
    return generation_config, generation_config.update(**options)
