"""`generate` of a gated LM: checks the call, then decodes by one of the two paths of `decoding.py`."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, StopStringCriteria
from transformers.utils import logging

from .caches import growing_cache, prefill, read_common_start
from .config import ProxyConfig
from .decoding import PrefixGate, StopRecorder, candidate_decode
from .rollout import ProxyGenerateOutput, record_steps
from .taps import HiddenTap, PooledTap

logger = logging.get_logger(__name__)

# `generate` options of the LM's own sampling. The gate's candidates take their place.
_TRUNCATIONS = ("top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")


class GatedGeneration:
    """Mixin of [`~trl_proxy.ProxyModelForCausalLM`]."""

    # What the model brings.
    lm: Any
    config: Any
    generation_config: Any
    proxy_by_row: Callable
    proxy_config: Any
    _proxy_disabled: bool
    _judge: Callable

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        *,
        gate_sample: bool = False,
        threshold: float | None = None,
        output_rollout: bool = False,
        tree: bool | None = None,
        proxy_names: list[str] | None = None,
        logits_processor: list | None = None,
        streamer=None,
        **kwargs,
    ):
        """Gated decoding with the options of the LM's own `generate`.

        Args:
            inputs: `(batch, prompt length)` int64, left-padded prompts; `input_ids` is the same.
            gate_sample: draw the gate's decisions (training) instead of taking the more probable one.
            threshold: in place of the configuration's; see `gate.decide`.
            output_rollout: also return what training needs, [`rollout.Rollout`] (implies `return_dict_in_generate`).
            tree: with candidate features, judge several candidates of a position in one forward; by default where few
                rows are decoded, on a CPU in bfloat16 only. With prefix features all are judged at once anyway.
            proxy_names: a loaded proxy for each prompt, in place of the active one; `"__base__"` for the LM itself.
                Each decides from its own threshold on; `threshold` is added.
            generation_config, logits_processor, streamer, kwargs: as for `generate` of transformers. `temperature` is
                that of the proposals. `do_sample` and the truncations (`top_k`, ...) do not apply: `p_t` and
                `max_candidates` of the configuration decide what is proposed. `num_beams` and assisted generation
                (`assistant_model`, `prompt_lookup_num_tokens`; with `gate_sample` alone) go by the gated logits of
                `forward`, on which the caller's penalties and bans then act, and make no record of decisions.

        Returns:
            `(batch, length)` int64, or with `return_dict_in_generate` a [`rollout.ProxyGenerateOutput`] with the
            record of decisions.

        Raises:
            `ValueError`: right-padded prompts, more tokens than the LM has positions, proxies that do not go together
                in one batch, or beams and assisted generation with candidate features.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        if self._proxy_disabled:
            return self.lm.generate(
                input_ids, generation_config, logits_processor=logits_processor, streamer=streamer, **kwargs
            )
        setting = functools.partial(_setting, kwargs, generation_config, self.generation_config)
        eos_token_ids = _as_list(setting("eos_token_id"))
        _refuse_what_has_no_meaning(setting, kwargs)
        prompts = self._checked_prompts(input_ids, kwargs.pop("attention_mask", None), setting, eos_token_ids)
        assisted = kwargs.get("assistant_model") is not None or bool(setting("prompt_lookup_num_tokens"))
        if assisted or (setting("num_beams") or 1) > 1:
            by_decision = {"threshold": threshold, "tree": tree, "proxy_names": proxy_names}
            by_decision |= {"temperature": kwargs.get("temperature"), "output_rollout": output_rollout or None}
            given = [name for name, value in by_decision.items() if value is not None]
            _check_closed_form(self.proxy_config, assisted, gate_sample, given)
            kwargs |= {"logits_processor": logits_processor, "streamer": streamer}
            return self._generate_from_logits(*prompts, generation_config, do_sample=gate_sample, **kwargs)

        repeats = setting("num_return_sequences") or 1
        proxy = self.proxy_by_row(proxy_names, len(prompts[0]), repeats, prompts[0].device)
        config = proxy.config
        if kwargs.get("temperature") is not None:
            config = dataclasses.replace(config, temperature=kwargs["temperature"])
        threshold = config.threshold if threshold is None else threshold
        return_dict = kwargs.pop("return_dict_in_generate", False) or output_rollout
        criteria = list(kwargs.pop("stopping_criteria", None) or [])
        if setting("stop_strings") is not None:
            if kwargs.get("tokenizer") is None:
                raise ValueError("`stop_strings` need the tokenizer: pass `tokenizer=...` to `generate`.")
            criteria.append(StopStringCriteria(kwargs.pop("tokenizer"), setting("stop_strings")))
        input_ids, attention_mask = (x.repeat_interleave(repeats, dim=0) for x in prompts)
        options = {
            **{name: value for name, value in kwargs.items() if name not in _TRUNCATIONS},
            # The one token per row that the gate leaves is taken by `argmax`; the values are transformers' defaults.
            "do_sample": False,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "attention_mask": attention_mask,
            "return_dict_in_generate": True,
            # Done here: prompts are repeated, and the criteria include the stop strings.
            "num_return_sequences": 1,
            "stop_strings": None,
        }
        generation_config, options = _merged(generation_config, options)
        processors = LogitsProcessorList(logits_processor or [])

        if config.features == "candidate":
            loop = functools.partial(
                candidate_decode,
                judge=proxy.accept_logits,
                config=config,
                threshold=threshold,
                sample=gate_sample,
                output_rollout=output_rollout,
                repeats=repeats,
                tree=tree,
                # `generate` hands no streamer to a function.
                streamer=streamer,
            )
            if streamer is not None:
                streamer.put(input_ids.cpu())
            output = self.lm.generate(
                input_ids,
                generation_config,
                logits_processor=processors,
                stopping_criteria=criteria,
                custom_generate=loop,
                **options,
            )
            return output if return_dict else output.sequences

        cache = options.get("past_key_values")
        if config.pooled_features and cache is not None and cache.get_seq_length():
            raise ValueError("Pooled features need the whole prompt: pass no filled `past_key_values`.")
        stops = StopRecorder(criteria)
        layers = config.feature_layers
        with (
            PooledTap(self.lm, layers, attention_mask) if config.pooled_features else HiddenTap(self.lm, layers) as tap
        ):
            chosen = cache is not None or setting("use_cache") is False or setting("cache_implementation") is not None
            if not chosen:
                if repeats > 1:
                    cache = prefill(self.lm, *prompts, tap)
                elif (
                    self.lm.dtype
                    != torch.float32  # a forward of another shape rounds otherwise, which shows in bfloat16
                    or setting("output_hidden_states")  # of the whole prompt
                    or setting("output_attentions")
                ):
                    cache = growing_cache(self.lm)
                else:
                    cache = read_common_start(self.lm, *prompts, tap)
                if cache is not None:
                    cache.batch_repeat_interleave(repeats)
                    options["past_key_values"] = cache
                elif repeats > 1:
                    logger.warning_once(
                        f"{type(self.lm).__name__} keeps no keys and values: each sequence reads its prompt."
                    )
            judge = functools.partial(self._judge, proxy)
            gate = PrefixGate(judge, config, tap, attention_mask, threshold, gate_sample, output_rollout)
            output = self.lm.generate(
                input_ids,
                generation_config,
                logits_processor=LogitsProcessorList([*processors, gate]),
                stopping_criteria=[stops] if criteria else None,
                streamer=streamer,
                **options,
            )
        if not return_dict:
            return output.sequences
        eos = torch.tensor(eos_token_ids, dtype=torch.long, device=input_ids.device)
        decisions, rollout = record_steps(gate.steps, output.sequences[:, input_ids.shape[1] :], eos, stops.stopped)
        return ProxyGenerateOutput(**output, decisions=decisions, rollout=rollout)

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers, on the gated logits of `forward`; behind `generate_batch` and `transformers serve`.

        Raises:
            `ValueError`: candidate features have no such logits, and pooled features are of one text at a time.
        """
        config = self.proxy_config
        if not self._proxy_disabled and (config.features == "candidate" or config.pooled_features):
            raise ValueError(
                "Continuous batching needs a proxy with features='prefix' and pooled_features=False: use `generate`."
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _generate_from_logits(self, input_ids, attention_mask, generation_config, **options):
        """transformers' own `generate` on the logits of `forward`: there the gated LM is an LM like any other."""
        options |= {**dict.fromkeys(_TRUNCATIONS), "temperature": 1.0}
        generation_config, options = _merged(generation_config, options)
        return super().generate(  # type: ignore[misc]
            input_ids, generation_config, attention_mask=attention_mask, **options
        )

    def _checked_prompts(self, input_ids, attention_mask, setting, eos_token_ids) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts and their mask, `(batch, prompt length)` each; `ValueError` where they cannot be gone on from."""
        if input_ids is None:
            raise ValueError("`generate` needs `input_ids`: a gated LM goes on from tokens, not from embeddings.")
        if attention_mask is None:
            # As transformers reads it off the prompts.
            pad = setting("pad_token_id")
            known = pad is not None and pad not in eos_token_ids
            attention_mask = (input_ids != pad).long() if known else torch.ones_like(input_ids)
        if (attention_mask[:, -1] == 0).any():
            raise ValueError("The prompts are padded on the right: set `tokenizer.padding_side = 'left'`.")
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        width = input_ids.shape[1]
        # 20 new tokens are transformers' own default.
        new_tokens = setting("max_new_tokens") or (setting("max_length") or width + 20) - width
        if limit is not None and width + new_tokens > limit:
            raise ValueError(
                f"Prompt and response need {width + new_tokens} positions ({width} + {new_tokens}), the LM has "
                f"{limit}: shorten the prompts or `max_new_tokens`."
            )
        return input_ids, attention_mask


def _refuse_what_has_no_meaning(setting, kwargs: dict) -> None:
    """`ValueError` for the options of `generate` that a gate cannot follow; a warning for those that do not apply."""
    if (setting("guidance_scale") or 1) != 1:
        raise ValueError("`guidance_scale` is not supported: it runs the LM a second time in a step; set it to 1.")
    if ignored := [name for name in _TRUNCATIONS if kwargs.get(name) is not None]:
        logger.warning_once(f"{', '.join(ignored)} do not apply to a gated LM: set `p_t` and `max_candidates`.")


def _check_closed_form(config: ProxyConfig, assisted: bool, gate_sample: bool, by_decision: list[str]) -> None:
    """`ValueError` where beams or assisted generation cannot go by the logits of `forward`, or were given options of
    decisions."""
    if config.features == "candidate":
        raise ValueError(
            "`num_beams` and assisted generation need a proxy with features='prefix': leave them out (`num_beams=1`)."
        )
    if by_decision:
        raise ValueError(
            "`num_beams` and assisted generation go by the distribution of the next token, not by decisions: leave "
            f"out {', '.join(f'`{name}`' for name in by_decision)}."
        )
    if assisted and not gate_sample:
        raise ValueError("Assisted generation draws its tokens: pass `gate_sample=True`.")
    if not assisted and (gate_sample or config.proposal == "sampled"):
        raise ValueError(
            "Beam search looks for the most probable response: leave out `gate_sample`, and let `proposal` "
            "of the proxy be 'ranked'."
        )


def _merged(generation_config, options: dict) -> tuple[Any, dict]:
    """A copy of the caller's generation configuration with these options, and those of them that are not its own; just
    the options where there is no configuration."""
    if generation_config is None:
        return None, options
    generation_config = copy.deepcopy(generation_config)
    return generation_config, generation_config.update(**options)


def _setting(kwargs: dict, *args):
    """`(kwargs, generation_config, default_config, name)`: the call's value, also None, else the first that is set."""
    *configs, name = args
    if name in kwargs:
        return kwargs[name]
    return next((x for c in configs if c is not None and (x := getattr(c, name, None)) is not None), None)


def _as_list(ids: int | list[int] | None) -> list[int]:
    """Token ids as a list."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
